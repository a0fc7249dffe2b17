"""Attention of single rows to the paged cache: softmax(cap(q k^T * scale)) v, without a copy of any context.

Each row and KV head is one piece of work, in tiles of keys with a running softmax (Milakov and Gimelshein 2018), so
that scores stay in registers and the first-level cache. While a tile is computed the next one is asked for: blocks of
K and V are too small for the processor to see what comes.

Reference: `attention.attend`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import Final

import numba
import numpy as np
import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.cpu_kernels.exp import exp
from worker_svc.cpu_kernels.launch import (
    LINE,
    Kernel,
    address_of,
    arguments,
    as_argument,
    check_rows,
    floats,
    integers,
    kernel,
    larger,
    launch,
    num_threads,
    number,
    prefetch,
    refusal,
    thread_number,
)
from worker_svc.cpu_kernels.segments import Group

# Keys of a tile: whole blocks.
TILE: Final = 4 * BLOCK_SIZE
# Bytes of K and V that take about a millisecond to read.
LONG_BYTES: Final = 16 * 2**20
_ONE: Final = np.float32(1.0)
_TWO: Final = np.float32(2.0)
_ZERO: Final = np.float32(0.0)
_LOWEST: Final = np.float32(-np.inf)


@numba.njit(inline="always")
def _place_of(block, head, num_slots, head_dim):
    """Bytes from the start of all keys, or values, to those of a block and head."""
    return 4 * (head * num_slots + block * BLOCK_SIZE) * head_dim


@cache
def _compiled(group: int, head_dim: int) -> Kernel:
    """For so many query heads on each KV head, and channels: loops of known length become vector instructions."""

    @kernel
    def paged_attention(pointer):
        args = arguments(pointer)
        num_kv_heads, num_slots, q_stride = args[1], args[2], args[3]
        scale, soft_cap = np.float32(number(args[4])), np.float32(number(args[5]))
        # Through one more address, so that a recorded launch finds the plan of the day.
        plan = integers(args[8], 3)
        num_rows = plan[2]
        rows, blocks = integers(plan[0], (num_rows, 4)), integers(plan[1], 1)
        weights = np.empty((group, TILE), np.float32)
        total = np.empty((group, head_dim), np.float32)
        highest = np.empty(group, np.float32)
        sums = np.empty(group, np.float32)
        step = num_threads()
        for item in range(thread_number(), num_rows * num_kv_heads, step):
            i, head = item // num_kv_heads, item % num_kv_heads
            row, first_block, first, end = rows[i, 0], rows[i, 1], rows[i, 2], rows[i, 3]
            q = floats(args[9] + 4 * (row * q_stride + head * group * head_dim), (group, head_dim))
            out = floats(args[10] + 4 * (row * args[11] + head * group * head_dim), (group, head_dim))
            for g in range(group):
                highest[g], sums[g] = _LOWEST, _ZERO
                for d in range(head_dim):
                    total[g, d] = _ZERO
            for start in range(0, end, TILE):
                low, high = max(0, first - start), min(TILE, end - start)
                here = first_block + start // BLOCK_SIZE
                # What comes after: of this piece of work or of the next one.
                there, next_head, next_high = here + TILE // BLOCK_SIZE, head, end - start - TILE
                if next_high <= 0 and item + step < num_rows * num_kv_heads:
                    i, next_head = (item + step) // num_kv_heads, (item + step) % num_kv_heads
                    there, next_high = rows[i, 1], rows[i, 3]
                for column in range(0, high, BLOCK_SIZE):
                    place = _place_of(blocks[here + column // BLOCK_SIZE], head, num_slots, head_dim)
                    keys = floats(args[6] + place, (BLOCK_SIZE, head_dim))
                    ahead = place
                    if column < next_high:
                        ahead = _place_of(blocks[there + column // BLOCK_SIZE], next_head, num_slots, head_dim)
                    for j in range(min(BLOCK_SIZE, high - column)):
                        for line in range(0, 4 * head_dim, LINE):
                            prefetch(args[6] + ahead + 4 * j * head_dim + line)
                        for g in range(group):
                            score = _ZERO
                            for d in range(head_dim):
                                score += q[g, d] * keys[j, d]
                            weights[g, column + j] = score * scale
                for g in range(group):
                    if soft_cap > _ZERO:
                        for j in range(high):
                            x = weights[g, j] / soft_cap
                            weights[g, j] = soft_cap * (_ONE - _TWO / (exp(_TWO * x) + _ONE))
                    # Hidden only now, since loops from 0 on are what the compiler makes vector instructions of.
                    for j in range(low):
                        weights[g, j] = _LOWEST
                    top = highest[g]
                    for j in range(high):
                        top = larger(weights[g, j], top)
                    # With all scores NaN or -inf there is none.
                    shrink = exp(highest[g] - top)
                    added = _ZERO
                    for j in range(high):
                        x = exp(weights[g, j] - top)
                        weights[g, j] = x
                        added += x
                    highest[g] = top
                    sums[g] = sums[g] * shrink + added
                    for d in range(head_dim):
                        total[g, d] *= shrink
                for column in range(0, high, BLOCK_SIZE):
                    place = _place_of(blocks[here + column // BLOCK_SIZE], head, num_slots, head_dim)
                    values = floats(args[7] + place, (BLOCK_SIZE, head_dim))
                    ahead = place
                    if column < next_high:
                        ahead = _place_of(blocks[there + column // BLOCK_SIZE], next_head, num_slots, head_dim)
                    # Not even by 0 are values that nobody sees multiplied: they may be infinite.
                    begin, stop = max(0, low - column), min(BLOCK_SIZE, high - column)
                    # Four keys at a time: sums are read and written a quarter as often.
                    for j in range(begin, stop - 3, 4):
                        for line in range(0, 16 * head_dim, LINE):
                            prefetch(args[7] + ahead + 4 * j * head_dim + line)
                        for g in range(group):
                            k = column + j
                            a, b, c, e = weights[g, k], weights[g, k + 1], weights[g, k + 2], weights[g, k + 3]
                            for d in range(head_dim):
                                total[g, d] += (
                                    a * values[j, d]
                                    + b * values[j + 1, d]
                                    + c * values[j + 2, d]
                                    + e * values[j + 3, d]
                                )
                    for j in range(stop - max(0, stop - begin) % 4, stop):
                        for g in range(group):
                            a = weights[g, column + j]
                            for d in range(head_dim):
                                total[g, d] += a * values[j, d]
            for g in range(group):
                factor = _ONE / sums[g]
                for d in range(head_dim):
                    out[g, d] = total[g, d] * factor

    return paged_attention


class RowPlan:
    """Rows of a step and the keys that each of them sees, for one window."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        rows: list[tuple[int, int, int, int]] = []
        # Arrays, since a tensor takes several times as long to make.
        self._blocks = array("q")
        self.num_keys = 0
        for group in groups:
            for row, table, first, end in group.rows():
                skipped = first // BLOCK_SIZE
                rows.append((row, len(self._blocks), first - skipped * BLOCK_SIZE, end - skipped * BLOCK_SIZE))
                self._blocks.extend(table[skipped : -(-end // BLOCK_SIZE)])
                self.num_keys += end - first
        self.num_rows = len(rows)
        self._rows = array("q", chain.from_iterable(rows))
        self.addresses = array("q", [address_of(self._rows), address_of(self._blocks), len(rows)])

    def take(self, other: RowPlan) -> None:
        """Become this plan, in the place where recorded launches look for it."""
        self._rows, self._blocks = other._rows, other._blocks
        self.num_rows, self.num_keys = other.num_rows, other.num_keys
        self.addresses[:] = other.addresses


def paged_attention(
    q: torch.Tensor, kv: torch.Tensor, plan: RowPlan, out: torch.Tensor, *, softmax_scale: float, soft_cap: float | None
) -> None:
    """Attend with the rows of the plan.

    Args:
        q: [T, H, D] float32; heads and channels of a row contiguous.
        kv: [2 * KH, N * S, D] float32, contiguous; one layer's cache, the step's own tokens already in it.
        plan: of rows of q, each of which sees something, and of slots of kv.
        out: [T, H * D] float32, each row contiguous; the rows of the plan are written.
        softmax_scale: what scores are multiplied by.
        soft_cap: scores become cap * tanh(score / cap).

    Raises:
        ValueError: another shape, type or layout.
    """
    is_long = 4 * plan.num_keys * len(kv) * kv.shape[2] > LONG_BYTES
    launch_attention(_compiled, q, kv, plan.addresses, out, softmax_scale, soft_cap, is_long=is_long)


def launch_attention(
    compiled: Callable[[int, int], Kernel],
    q: torch.Tensor,
    kv: torch.Tensor,
    plan: array[int],
    out: torch.Tensor,
    softmax_scale: float,
    soft_cap: float | None,
    *,
    is_long: bool,
) -> None:
    """What kernels of attention have in common: what they ask of their tensors, and the order of their arguments.

    Args:
        compiled: makes the kernel for so many query heads on each KV head, and channels.
        plan: addresses that the kernel understands, of int64.

    The others, and errors, are those of `paged_attention`.
    """
    num_heads, num_slots, head_dim = kv.shape
    num_kv_heads = num_heads // 2
    num_rows, num_query_heads, width = q.shape
    if num_query_heads % num_kv_heads or width != head_dim or q.stride()[1:] != (head_dim, 1):
        raise refusal("q", q, f"rows of shape [any * {num_kv_heads}, {head_dim}], each contiguous")
    check_rows("out", out, num_query_heads * head_dim)
    launch(
        compiled(num_query_heads // num_kv_heads, head_dim),
        torch.get_num_threads(),
        num_rows,
        num_kv_heads,
        num_slots,
        q.stride(0),
        as_argument(softmax_scale),
        as_argument(soft_cap or 0.0),
        kv.data_ptr(),
        kv.data_ptr() + 4 * num_kv_heads * num_slots * head_dim,
        address_of(plan),
        q.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        is_long=is_long,
    )
