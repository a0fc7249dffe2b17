"""Attention of many rows that see the same keys: softmax(cap(q k^T * scale)) v (Dao 2023, FlashAttention-2).

A piece of work is some rows of a group and one KV head, with the queries of all heads that share it as rows of their
own. Keys are packed once for a tile of them, transposed and from as many runs as it takes; then tiles of rows get their
scores, a running softmax, and their sums of values, and scores never leave the first-level cache.

Reference: `attention.attend`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from worker_svc.cpu_kernels.exp import exp
from worker_svc.cpu_kernels.launch import (
    Kernel,
    address_of,
    arguments,
    floats,
    integers,
    kernel,
    num_threads,
    number,
    thread_number,
)
from worker_svc.cpu_kernels.paged_attention import launch_attention
from worker_svc.cpu_kernels.register_tiles import (
    LANES,
    MAX_TILE_ROWS,
    PANEL,
    UNROLL,
    add_tile,
    load_from,
    multiply_tile,
    shuffled,
    transpose_square,
)
from worker_svc.cpu_kernels.segments import Group

# Keys of a tile: their transpose and their values fit into the first-level cache.
KEYS: Final = 64
# Rows of a piece of work.
MAX_ROWS: Final = 64
_ALL: Final = 2**40
_ONE: Final = np.float32(1.0)
_TWO: Final = np.float32(2.0)
_ZERO: Final = np.float32(0.0)
_LOWEST: Final = np.float32(-np.inf)


@intrinsic
def _largest(context: Any, address: Any) -> Any:
    """Of KEYS numbers; where some are NaN it may be any of them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), LANES)
        places = [builder.add(args[0], ir.IntType(64)(4 * i)) for i in range(0, KEYS, LANES)]
        vectors = [load_from(builder, place, vector, 4) for place in places]
        while len(vectors) > 1:
            vectors = [_larger(builder, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
        found, distance = vectors[0], LANES // 2
        while distance:
            lanes = [lane ^ distance for lane in range(LANES)]
            found = _larger(builder, found, shuffled(builder, found, found, lanes))
            distance //= 2
        return builder.extract_element(found, ir.IntType(32)(0))

    return types.float32(types.int64), generate


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


@cache
def _compiled(group: int, head_dim: int) -> Kernel:
    """For so many query heads on each KV head, and channels."""

    @kernel
    def tiled_attention(pointer):
        args = arguments(pointer)
        num_kv_heads, num_slots, q_stride = args[1], args[2], args[3]
        scale, soft_cap = np.float32(number(args[4])), np.float32(number(args[5]))
        plan = integers(args[8], 6)
        num_pieces, num_segments, num_runs = plan[0], plan[1], plan[2]
        pieces, segments = integers(plan[3], (num_pieces, 4)), integers(plan[4], (num_segments, 6))
        runs = integers(plan[5], (num_runs, 2))
        q = np.empty((MAX_ROWS * group, head_dim), np.float32)
        total = np.empty((MAX_ROWS * group, head_dim), np.float32)
        highest, sums = np.empty(MAX_ROWS * group, np.float32), np.empty(MAX_ROWS * group, np.float32)
        transposed = np.zeros((KEYS // PANEL, head_dim, PANEL), np.float32)
        gathered = np.empty((KEYS, head_dim), np.float32)
        scores = np.empty((MAX_TILE_ROWS, KEYS), np.float32)
        q_at, transposed_at = np.int64(q.ctypes.data), np.int64(transposed.ctypes.data)
        scores_at, total_at = np.int64(scores.ctypes.data), np.int64(total.ctypes.data)
        gathered_at = np.int64(gathered.ctypes.data)
        for item in range(thread_number(), num_pieces * num_kv_heads, num_threads()):
            head = item % num_kv_heads
            first_row, num_rows = pieces[item // num_kv_heads, 0], pieces[item // num_kv_heads, 1]
            first_segment, end_segment = pieces[item // num_kv_heads, 2], pieces[item // num_kv_heads, 3]
            for row in range(num_rows):
                source = floats(
                    args[9] + 4 * ((first_row + row) * q_stride + head * group * head_dim), group * head_dim
                )
                for i in range(group * head_dim):
                    q[row * group + i // head_dim, i % head_dim] = source[i] * scale
            for row in range(num_rows * group):
                highest[row], sums[row] = _LOWEST, _ZERO
                for d in range(head_dim):
                    total[row, d] = _ZERO
            for index in range(first_segment, end_segment):
                own_row, own_rows, run = segments[index, 0], segments[index, 1], segments[index, 2]
                num_seen, num_keys, window = segments[index, 3], segments[index, 4], segments[index, 5]
                # Of the run, and of the segment, whose first keys nobody may see.
                offset = max(0, num_seen - window)
                start = offset
                while offset >= runs[run, 1]:
                    offset -= runs[run, 1]
                    run += 1
                while start < num_keys:
                    is_gathered = min(KEYS, num_keys - start) > runs[run, 1] - offset
                    values_at = args[7] + 4 * (head * num_slots + runs[run, 0] + offset) * head_dim
                    if is_gathered:
                        values_at = gathered_at
                    count = 0
                    while count < KEYS and start + count < num_keys:
                        more = min(KEYS - count, num_keys - start - count, runs[run, 1] - offset)
                        place = 4 * (head * num_slots + runs[run, 0] + offset) * head_dim
                        keys_at = args[6] + place
                        keys = floats(keys_at, (more, head_dim))
                        j = 0
                        while j < more:
                            column = count + j
                            if column % LANES == 0 and more - j >= LANES:
                                for d in range(0, head_dim, LANES):
                                    target = transposed_at + 4 * (
                                        (column // PANEL * head_dim + d) * PANEL + column % PANEL
                                    )
                                    transpose_square(keys_at + 4 * (j * head_dim + d), 4 * head_dim, target, 4 * PANEL)
                                j += LANES
                            else:
                                for d in range(head_dim):
                                    transposed[column // PANEL, d, column % PANEL] = keys[j, d]
                                j += 1
                        if is_gathered:
                            source = floats(args[7] + place, more * head_dim)
                            copy = floats(gathered_at + 4 * count * head_dim, more * head_dim)
                            for i in range(more * head_dim):
                                copy[i] = source[i]
                        count += more
                        offset += more
                        if offset == runs[run, 1]:
                            run += 1
                            offset = 0
                    values = floats(values_at, (count, head_dim))
                    row = own_row * group
                    end = (own_row + own_rows) * group
                    while row < end:
                        tile = 1
                        for rows in (3, 6, 12):
                            if rows <= MAX_TILE_ROWS and rows <= end - row:
                                tile = rows
                        # The last row of the tile sees most.
                        last = (row + tile - 1) // group - own_row
                        if start >= num_seen + last:
                            row += tile
                            continue
                        source = q_at + 4 * row * head_dim
                        for panel in range((count + PANEL - 1) // PANEL):
                            target = scores_at + 4 * panel * PANEL
                            packed = transposed_at + 4 * panel * head_dim * PANEL
                            multiply_tile(tile, source, 4 * head_dim, packed, 4 * PANEL, head_dim, target, 4 * KEYS)
                        for r in range(tile):
                            seen = num_seen + (row + r) // group - own_row - start
                            low = max(0, seen - window)
                            high = min(count, seen)
                            # From here on loops are over all of KEYS, a number that the compiler knows.
                            line = floats(scores_at + 4 * KEYS * r, KEYS)
                            if soft_cap > _ZERO:
                                for j in range(KEYS):
                                    x = line[j] / soft_cap
                                    line[j] = soft_cap * (_ONE - _TWO / (exp(_TWO * x) + _ONE))
                            if low >= high:
                                for j in range(KEYS):
                                    line[j] = _ZERO
                                continue
                            for j in range(low):
                                line[j] = _LOWEST
                            for j in range(KEYS - high):
                                line[KEYS - 1 - j] = _LOWEST
                            before = highest[row + r]
                            top = max(before, _largest(scores_at + 4 * KEYS * r))
                            weight = _ZERO
                            for j in range(KEYS):
                                x = exp(line[j] - top)
                                line[j] = x
                                weight += x
                            shrink = exp(before - top)
                            highest[row + r] = top
                            sums[row + r] = sums[row + r] * shrink + weight
                            # Seldom after the first keys.
                            if shrink != _ONE:
                                for d in range(head_dim):
                                    total[row + r, d] *= shrink
                        whole = count // UNROLL * UNROLL
                        if whole > 0:
                            for column in range(0, head_dim, PANEL):
                                panel_at = values_at + 4 * column
                                target = total_at + 4 * (row * head_dim + column)
                                add_tile(tile, scores_at, 4 * KEYS, panel_at, 4 * head_dim, whole, target, 4 * head_dim)
                        for j in range(whole, count):
                            for r in range(tile):
                                x = scores[r, j]
                                for d in range(head_dim):
                                    total[row + r, d] += x * values[j, d]
                        row += tile
                    start += count
            for row in range(num_rows):
                out = floats(args[10] + 4 * ((first_row + row) * args[11] + head * group * head_dim), group * head_dim)
                for g in range(group):
                    factor = _ONE / sums[row * group + g]
                    for d in range(head_dim):
                        out[g * head_dim + d] = total[row * group + g, d] * factor

    return tiled_attention


def can_attend(head_dim: int) -> bool:
    """Whether there is code for heads of this many channels."""
    return head_dim % PANEL == 0


class TilePlan:
    """Groups of a step, in pieces, for one window."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        pieces: list[tuple[int, int, int, int]] = []
        segments: list[tuple[int, int, int, int, int, int]] = []
        runs: list[tuple[int, int]] = []
        for group in groups:
            own_segments, first_runs = list(group.segments()), []
            for segment in own_segments:
                first_runs.append(len(runs))
                runs += segment.runs
            end = group.first_row + group.num_rows
            for first in range(group.first_row, end, MAX_ROWS):
                num_rows = min(MAX_ROWS, end - first)
                begin = len(segments)
                for segment, first_run in zip(own_segments, first_runs, strict=True):
                    own = max(first, segment.first_row)
                    num_own = min(first + num_rows, segment.first_row + segment.num_rows) - own
                    if num_own > 0:
                        num_seen = segment.num_seen + own - segment.first_row
                        num_keys = segment.num_seen_by(own + num_own - 1)
                        window = _ALL if segment.window is None else segment.window
                        segments.append((own - first, num_own, first_run, num_seen, num_keys, window))
                pieces.append((first, num_rows, begin, len(segments)))
        self._columns = [array("q", chain.from_iterable(rows)) for rows in (pieces, segments, runs)]
        sizes = len(pieces), len(segments), len(runs)
        self.addresses = array("q", [*sizes, *map(address_of, self._columns)])

    def take(self, other: TilePlan) -> None:
        """Become this plan, in the place where recorded launches look for it."""
        self._columns = other._columns
        self.addresses[:] = other.addresses


def tiled_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    plan: TilePlan,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
) -> None:
    """Attend with the groups of the plan; arguments and errors as of `paged_attention`."""
    launch_attention(_compiled, q, kv, plan.addresses, out, softmax_scale, soft_cap, is_long=True)
