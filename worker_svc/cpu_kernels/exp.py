"""e^x in a form that the compiler turns into vector instructions, which it cannot do with the C library's."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from worker_svc.cpu_kernels.launch import FAST_MATH, bounded, float_of_bits

# From here on n is -127 and 128, whose bits are those of 0 and of infinity.
_LOWEST = np.float32(-88.0)
_HIGHEST = np.float32(89.0)
_LOG2_E = np.float32(1.44269504)
# ln 2 in two parts, of which the first has few bits, so that its multiples are exact (Cody and Waite 1980).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)


@intrinsic
def _multiply_add(context: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z as it is written: fast math would add up the two parts of ln 2 first, and be off by 4.5 units."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), generate


@numba.njit(inline="always", fastmath=FAST_MATH)
def exp(x):
    """Of a float32: within 2 units in the last place from -87.3 to 88.3, beyond 0 and infinity; NaN of NaN.

    x = n ln 2 + r: the bits of n are the exponent of 2^n, and for |r| <= ln 2 / 2 e^r is a polynomial, with the
    coefficients of the best one of its degree (Cephes, `expf`).
    """
    x = bounded(x, _LOWEST, _HIGHEST)
    n = np.floor(x * _LOG2_E + _HALF)
    r = _multiply_add(n, -_LN2_LOW, _multiply_add(n, -_LN2_HIGH, x))
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + _ONE
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
