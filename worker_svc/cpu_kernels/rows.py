"""Some rows of a tensor, copied: `index_select`, which is the reference."""

from __future__ import annotations

import math

import torch

from worker_svc.cpu_kernels.launch import (
    arguments,
    check,
    empty,
    floats,
    integers,
    kernel,
    launch,
    num_threads,
    refusal,
    thread_number,
    threads_for,
)


@kernel
def _take_rows(pointer):
    args = arguments(pointer)
    num_rows, size, stride = args[0], args[1], args[2]
    rows, out = integers(args[3], num_rows), floats(args[5], (num_rows, size))
    for i in range(thread_number(), num_rows, num_threads()):
        row = floats(args[4] + 4 * rows[i] * stride, size)
        for j in range(size):
            out[i, j] = row[j]


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of x in the order asked for.

    Args:
        x: [T, ...] float32, each row contiguous.
        rows: [R] int64, from 0 to T - 1: nothing here looks whether they are.

    Returns:
        [R, ...], contiguous.

    Raises:
        ValueError: another type or layout.
    """
    check("rows", rows, (len(rows),), torch.int64)
    shape = x.shape[1:]
    if x.dtype is not torch.float32 or not x[:1].is_contiguous():
        raise refusal("x", x, "rows of torch.float32, each contiguous")
    size = math.prod(shape)
    out = empty(len(rows), size)
    pointers = (rows.data_ptr(), x.data_ptr(), out.data_ptr())
    launch(_take_rows, threads_for(out.numel()), len(rows), size, x.stride(0), *pointers)
    return out.view(len(rows), *shape)
