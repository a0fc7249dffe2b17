"""Rotary positions (Su et al. 2021) for q and k, and K and V into the paged cache, in one pass in float32.

Reference: `rope.rotate_` and a copy into the cache.
"""

from __future__ import annotations

import torch

from worker_svc.cpu_kernels.launch import (
    arguments,
    check,
    floats,
    integers,
    kernel,
    launch,
    num_threads,
    thread_number,
    threads_for,
)


@kernel
def _rotate_and_write(pointer):
    args = arguments(pointer)
    num_rows, num_heads, num_kv_heads, size, num_pairs, num_slots = args[0], args[1], args[2], args[3], args[4], args[5]
    slots = integers(args[6], num_rows)
    turns = floats(args[7], (num_rows, num_pairs, 2))
    cache = floats(args[8], (2 * num_kv_heads, num_slots, size))
    heads = floats(args[9], (num_rows, num_heads + 2 * num_kv_heads, size))
    for row in range(thread_number(), num_rows, num_threads()):
        slot = slots[row]
        for head in range(num_heads + num_kv_heads):
            for i in range(num_pairs):
                x, y = heads[row, head, 2 * i], heads[row, head, 2 * i + 1]
                cosine, sine = turns[row, i, 0], turns[row, i, 1]
                heads[row, head, 2 * i] = x * cosine - y * sine
                heads[row, head, 2 * i + 1] = x * sine + y * cosine
        for head in range(2 * num_kv_heads):
            for i in range(size):
                cache[head, slot, i] = heads[row, num_heads + head, i]


def rotate_and_write(qkv: torch.Tensor, turns: torch.Tensor, slots: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Rotate in place.

    Args:
        qkv: [T, (H + 2 * KH) * D] float32, contiguous; heads of q, k and v, channels of rotated ones interleaved.
        turns: [T, 1, P / 2] complex64, contiguous, P <= D; channels of a head from P on stay as they are.
        slots: [T] int64, from 0 to N * S - 1, no two alike: nothing here looks whether they are.
        kv: [2 * KH, N * S, D] float32, contiguous.

    Returns:
        q: [T, H, D], a view of `qkv`.

    Mutates:
        qkv, and the rows `slots` of kv.

    Raises:
        ValueError: another shape, type or layout.
    """
    num_heads, num_slots, size = kv.shape
    num_rows, num_pairs = len(qkv), min(turns.shape[-1], size // 2)
    num_query_heads = max(1, qkv.shape[-1] // size - num_heads)
    check("qkv", qkv, (num_rows, (num_query_heads + num_heads) * size))
    check("turns", turns, (num_rows, 1, num_pairs), torch.complex64)
    check("slots", slots, (num_rows,), torch.int64)
    launch(
        _rotate_and_write,
        threads_for(qkv.numel()),
        num_rows,
        num_query_heads,
        num_heads // 2,
        size,
        num_pairs,
        num_slots,
        slots.data_ptr(),
        turns.data_ptr(),
        kv.data_ptr(),
        qkv.data_ptr(),
    )
    return qkv.view(num_rows, num_query_heads + num_heads, size)[:, :num_query_heads]
