"""e^x in a form that the compiler turns into vector instructions, which it cannot do with the C library's."""

from __future__ import annotations

import numba
import numpy as np

from worker_svc.cpu_kernels.launch import FAST_MATH, float_of_bits

_LOWEST = np.float32(-87.0)
_HIGHEST = np.float32(88.0)
_LOG2_E = np.float32(1.44269504)
# ln 2 in two parts, of which the first has few bits, so that its multiples are exact (Cody and Waite 1980).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)


@numba.njit(inline="always", fastmath=FAST_MATH)
def exp(x):
    """Within 2 units in the last place for float32 from -87 to 88, and their powers beyond; NaN of NaN.

    x = n ln 2 + r: the bits of n are the exponent of 2^n, and for |r| <= ln 2 / 2 e^r is a polynomial, with the
    coefficients of the best one of its degree (Cephes, `expf`).
    """
    # NaN is neither below nor above.
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + _ONE
    # 88 takes n = 127, the largest exponent there is.
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
