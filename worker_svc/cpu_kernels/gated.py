"""activation(gate) * up in float32, one pass (Shazeer 2020), with SiLU or GELU by tanh (Hendrycks and Gimpel 2016).

Reference: `backends.torch_experts.gated`.
"""

from __future__ import annotations

import numpy as np
import torch

from worker_svc.backends.backend import Activation
from worker_svc.cpu_kernels.exp import exp
from worker_svc.cpu_kernels.launch import (
    arguments,
    check,
    empty_rows,
    floats,
    kernel,
    launch,
    num_threads,
    thread_number,
    threads_for,
)

_ONE = np.float32(1.0)
# tanh(y) = 1 - 2 / (e^2y + 1), so gelu = x * (1 - 1 / (e^2y + 1)) with y = sqrt(2 / pi) (x + 0.044715 x^3).
_TWO_ROOTS = np.float32(2.0 * 0.7978845608028654)
_CUBE = np.float32(0.044715)
# Values of exp that take as long as one of what `threads_for` counts.
_COST = 4


@kernel
def _silu(pointer):
    args = arguments(pointer)
    num_rows, size = args[0], args[1]
    for row in range(thread_number(), num_rows, num_threads()):
        gate = floats(args[2] + 8 * row * size, size)
        up = floats(args[2] + 8 * row * size + 4 * size, size)
        out = floats(args[3] + 4 * row * args[4], size)
        for i in range(size):
            out[i] = gate[i] / (_ONE + exp(-gate[i])) * up[i]


@kernel
def _gelu_tanh(pointer):
    args = arguments(pointer)
    num_rows, size = args[0], args[1]
    for row in range(thread_number(), num_rows, num_threads()):
        gate = floats(args[2] + 8 * row * size, size)
        up = floats(args[2] + 8 * row * size + 4 * size, size)
        out = floats(args[3] + 4 * row * args[4], size)
        for i in range(size):
            x = gate[i]
            power = exp(_TWO_ROOTS * (x + _CUBE * x * x * x))
            out[i] = x * (_ONE - _ONE / (power + _ONE)) * up[i]


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """One half of each row gates the other.

    Args:
        gate_up: [T, 2 * inner] float32, contiguous; the gate first.

    Returns:
        [T, inner], as `empty_rows` gives it.

    Raises:
        ValueError: another shape, type or layout.
    """
    num_rows, size = len(gate_up), gate_up.shape[-1] // 2
    check("gate_up", gate_up, (num_rows, 2 * size))
    out = empty_rows(num_rows, size)
    which = _silu if activation == "silu" else _gelu_tanh
    launch(which, threads_for(_COST * out.numel()), num_rows, size, gate_up.data_ptr(), out.data_ptr(), out.stride(0))
    return out
