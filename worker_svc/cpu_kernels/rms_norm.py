"""weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019), in float32.

Reference: `backends.torch_layers.RmsNorm`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from worker_svc.cpu_kernels.launch import (
    arguments,
    as_argument,
    check_rows,
    empty_rows,
    floats,
    kernel,
    launch,
    num_threads,
    number,
    thread_number,
    threads_for,
)


@kernel
def _rms_norm(pointer):
    args = arguments(pointer)
    num_rows, num_heads, size, stride = args[0], args[1], args[2], args[3]
    eps = np.float32(number(args[4]))
    weight = floats(args[5], (num_heads, size))
    for row in range(thread_number(), num_rows, num_threads()):
        for head in range(num_heads):
            x = floats(args[6] + 4 * (row * stride + head * size), size)
            out = floats(args[7] + 4 * (row * args[8] + head * size), size)
            squares = np.float32(0.0)
            for i in range(size):
                squares += x[i] * x[i]
            factor = np.float32(1.0) / math.sqrt(squares / np.float32(size) + eps)
            for i in range(size):
                out[i] = x[i] * factor * weight[head, i]


class RmsNorm:
    """Of rows, or of each of several heads in a row."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """`weight`: [E] or [heads, D], on the CPU; a copy is kept if it is not contiguous float32."""
        self._weight = weight.float().contiguous()
        num_heads, size = (1, len(weight)) if weight.dim() == 1 else weight.shape
        self._width = num_heads * size
        self._constants = (num_heads, size, as_argument(eps), self._weight.data_ptr())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [T, E] or [T, heads * D] float32, each row contiguous; returns the same shape, as `empty_rows` gives it.

        Raises:
            ValueError: another shape, type or layout.
        """
        check_rows("x", x, self._width)
        out = empty_rows(*x.shape)
        self._run(x, out)
        return out

    def norm_(self, x: torch.Tensor) -> None:
        """The same in place. `x`: [T, any] float32, each row contiguous, of which the first heads * D are normed.

        Raises:
            ValueError: fewer, or another type or layout.
        """
        check_rows("x", x, max(self._width, x.shape[-1]))
        self._run(x, x)

    def _run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        num_heads, size, eps, weight = self._constants
        threads = threads_for(len(x) * num_heads * size)
        launch(
            _rms_norm,
            threads,
            len(x),
            num_heads,
            size,
            x.stride(0),
            eps,
            weight,
            x.data_ptr(),
            out.data_ptr(),
            out.stride(0),
        )
