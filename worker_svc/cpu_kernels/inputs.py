"""What a step begins with: rows of the embedding, and the angles that its positions turn by.

References: `F.embedding` times a number, and `rope.turns`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from worker_svc.cpu_kernels.launch import (
    arguments,
    as_argument,
    check,
    empty,
    floats,
    integers,
    kernel,
    launch,
    num_threads,
    number,
    thread_number,
    threads_for,
)


@kernel
def _embed(pointer):
    args = arguments(pointer)
    num_rows, size, scale = args[0], args[1], np.float32(number(args[2]))
    token_ids = integers(args[3], num_rows)
    out = floats(args[5], (num_rows, size))
    for row in range(thread_number(), num_rows, num_threads()):
        known = floats(args[4] + 4 * token_ids[row] * size, size)
        for i in range(size):
            out[row, i] = known[i] * scale


@kernel
def _turns(pointer):
    args = arguments(pointer)
    num_rows, num_pairs, factor = args[0], args[1], np.float32(number(args[2]))
    positions, frequencies = integers(args[3], num_rows), floats(args[4], num_pairs)
    out = floats(args[5], (num_rows, num_pairs, 2))
    for row in range(thread_number(), num_rows, num_threads()):
        position = np.float32(positions[row])
        for i in range(num_pairs):
            angle = position * frequencies[i]
            out[row, i, 0] = factor * math.cos(angle)
            out[row, i, 1] = factor * math.sin(angle)


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows of a table, times a number.

    Args:
        token_ids: [T] int64, from 0 to V - 1: nothing here looks whether they are.
        table: [V, E] float32, contiguous.

    Returns:
        [T, E].

    Raises:
        ValueError: another shape, type or layout.
    """
    num_rows, size = len(token_ids), table.shape[-1]
    check("token_ids", token_ids, (num_rows,), torch.int64)
    check("table", table, (len(table), size))
    out = empty(num_rows, size)
    threads = threads_for(out.numel())
    arguments = (size, as_argument(scale), token_ids.data_ptr(), table.data_ptr(), out.data_ptr())
    launch(_embed, threads, num_rows, *arguments)
    return out


def turns(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """Complex numbers to turn by.

    Args:
        positions: [T] int64, up to 2^24, which float32 still holds.
        frequencies: [P / 2] float32, contiguous; radians a token.
        factor: length of the numbers.

    Returns:
        [T, 1, P / 2] complex64.

    Raises:
        ValueError: another shape, type or layout.
    """
    num_rows, num_pairs = len(positions), len(frequencies)
    check("positions", positions, (num_rows,), torch.int64)
    check("frequencies", frequencies, (num_pairs,))
    out = empty(num_rows, 1, num_pairs, 2)
    arguments = (num_pairs, as_argument(factor), positions.data_ptr(), frequencies.data_ptr(), out.data_ptr())
    launch(_turns, threads_for(16 * out.numel()), num_rows, *arguments)
    return torch.view_as_complex(out)
