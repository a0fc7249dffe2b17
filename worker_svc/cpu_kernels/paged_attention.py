"""Attention of single rows to the paged cache: softmax(cap(q k^T * scale)) v, without a copy of any context.

Each row and KV head is one piece of work, in tiles of keys with a running softmax (Milakov and Gimelshein 2018), so
that scores stay in registers and the first-level cache. While a tile is computed the next one is asked for: pages of
K and V are too small for the processor to see what comes.

Reference: `attention.attend`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final

import numpy as np
import torch

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

TILE: Final = 64
# Bytes of K and V that take about a millisecond to read.
LONG_BYTES: Final = 16 * 2**20
_ONE: Final = np.float32(1.0)
_TWO: Final = np.float32(2.0)
_ZERO: Final = np.float32(0.0)
_LOWEST: Final = np.float32(-np.inf)


@cache
def _compiled(group: int, head_dim: int) -> Kernel:
    """For so many query heads on each KV head, and channels: loops of known length become vector instructions."""

    @kernel
    def paged_attention(pointer):
        args = arguments(pointer)
        num_kv_heads, num_slots, q_stride = args[1], args[2], args[3]
        scale, soft_cap = np.float32(number(args[4])), np.float32(number(args[5]))
        keys = floats(args[6], (num_kv_heads, num_slots, head_dim))
        values = floats(args[7], (num_kv_heads, num_slots, head_dim))
        # Through one more address, so that a recorded launch finds the plan of the day.
        plan = integers(args[8], 5)
        num_rows = plan[4]
        rows, first_runs = integers(plan[0], num_rows), integers(plan[1], num_rows + 1)
        run_slots, run_counts = integers(plan[2], first_runs[num_rows]), integers(plan[3], first_runs[num_rows])
        weights = np.empty((group, TILE), np.float32)
        total = np.empty((group, head_dim), np.float32)
        highest = np.empty(group, np.float32)
        sums = np.empty(group, np.float32)
        step = num_threads()
        for item in range(thread_number(), num_rows * num_kv_heads, step):
            i, head = item // num_kv_heads, item % num_kv_heads
            q = floats(args[9] + 4 * (rows[i] * q_stride + head * group * head_dim), (group, head_dim))
            out = floats(args[10] + 4 * (rows[i] * args[11] + head * group * head_dim), (group, head_dim))
            for g in range(group):
                highest[g], sums[g] = _LOWEST, _ZERO
                for d in range(head_dim):
                    total[g, d] = _ZERO
            for run in range(first_runs[i], first_runs[i + 1]):
                for offset in range(0, run_counts[run], TILE):
                    slot = run_slots[run] + offset
                    count = min(TILE, run_counts[run] - offset)
                    next_head, next_slot = head, slot + TILE
                    if offset + TILE >= run_counts[run]:
                        if run + 1 < first_runs[i + 1]:
                            next_slot = run_slots[run + 1]
                        elif item + step < num_rows * num_kv_heads:
                            next_head = (item + step) % num_kv_heads
                            next_slot = run_slots[first_runs[(item + step) // num_kv_heads]]
                    ahead = 4 * (next_head * num_slots + next_slot) * head_dim
                    for j in range(count):
                        for line in range(0, 4 * head_dim, LINE):
                            prefetch(args[6] + ahead + 4 * j * head_dim + line)
                        for g in range(group):
                            score = _ZERO
                            for d in range(head_dim):
                                score += q[g, d] * keys[head, slot + j, d]
                            weights[g, j] = score * scale
                    for g in range(group):
                        if soft_cap > _ZERO:
                            for j in range(count):
                                x = weights[g, j] / soft_cap
                                weights[g, j] = soft_cap * (_ONE - _TWO / (exp(_TWO * x) + _ONE))
                        top = highest[g]
                        for j in range(count):
                            top = larger(weights[g, j], top)
                        # With all scores NaN or -inf there is none.
                        shrink = exp(highest[g] - top)
                        added = _ZERO
                        for j in range(count):
                            x = exp(weights[g, j] - top)
                            weights[g, j] = x
                            added += x
                        highest[g] = top
                        sums[g] = sums[g] * shrink + added
                        for d in range(head_dim):
                            total[g, d] *= shrink
                    # Four keys at a time: sums are read and written a quarter as often.
                    for j in range(0, count - 3, 4):
                        for line in range(0, 16 * head_dim, LINE):
                            prefetch(args[7] + ahead + 4 * j * head_dim + line)
                        for g in range(group):
                            a, b, c, e = weights[g, j], weights[g, j + 1], weights[g, j + 2], weights[g, j + 3]
                            for d in range(head_dim):
                                total[g, d] += (
                                    a * values[head, slot + j, d]
                                    + b * values[head, slot + j + 1, d]
                                    + c * values[head, slot + j + 2, d]
                                    + e * values[head, slot + j + 3, d]
                                )
                    for j in range(count // 4 * 4, count):
                        for g in range(group):
                            a = weights[g, j]
                            for d in range(head_dim):
                                total[g, d] += a * values[head, slot + j, d]
            for g in range(group):
                factor = _ONE / sums[g]
                for d in range(head_dim):
                    out[g, d] = total[g, d] * factor

    return paged_attention


class RowPlan:
    """Rows of a step and the runs of slots that each of them sees, for one window."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        rows: list[int] = []
        first_runs = [0]
        runs: list[tuple[int, int]] = []
        for group in groups:
            for row in range(group.first_row, group.first_row + group.num_rows):
                rows.append(row)
                for segment in group.segments:
                    if segment.first_row <= row < segment.first_row + segment.num_rows:
                        runs += _cut(segment.runs, *segment.seen_by(row))
                first_runs.append(len(runs))
        slots, counts = zip(*runs, strict=True) if runs else ((), ())
        self.num_rows, self.num_keys = len(rows), sum(counts)
        # Arrays, since a tensor takes several times as long to make: there are four in each step.
        self._columns = [array("q", column) for column in (rows, first_runs, slots, counts)]
        self.addresses = array("q", [*map(address_of, self._columns), len(rows)])

    def take(self, other: RowPlan) -> None:
        """Become this plan, in the place where recorded launches look for it."""
        self._columns, self.num_rows, self.num_keys = other._columns, other.num_rows, other.num_keys
        self.addresses[:] = other.addresses


def _cut(runs: Iterable[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """Keys `first` to `end` of those in the runs."""
    begin = 0
    for slot, count in runs:
        skipped, taken = max(0, first - begin), min(count, end - begin)
        if skipped < taken:
            yield slot + skipped, taken - skipped
        begin += count


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
