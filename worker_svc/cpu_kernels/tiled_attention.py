"""Attention of many rows that see the same keys: softmax(cap(q k^T * scale)) v (Dao 2023, FlashAttention-2).

A piece of work is some rows of a unit and one KV head, with the queries of all heads that share it as rows of their
own. For each tile of keys, whose transpose is packed once, tiles of rows get their scores, a running softmax, and their
sums of values; scores never leave the first-level cache.

Reference: `attention.attend`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import Final

import numpy as np
import torch

from worker_svc.attention_plan import Unit
from worker_svc.cpu_kernels.exp import exp
from worker_svc.cpu_kernels.launch import (
    Kernel,
    address_of,
    arguments,
    floats,
    integers,
    kernel,
    larger,
    num_threads,
    number,
    thread_number,
)
from worker_svc.cpu_kernels.paged_attention import launch_attention
from worker_svc.cpu_kernels.tiled_linear import MAX_TILE_ROWS, PANEL, UNROLL, multiply_tile

# Keys of a tile: their transpose and their values fit into the first-level cache.
KEYS: Final = 64
# Rows of a piece of work.
MAX_ROWS: Final = 64
_UNSEEN: Final = -(2**40)
_ONE: Final = np.float32(1.0)
_TWO: Final = np.float32(2.0)
_ZERO: Final = np.float32(0.0)
_LOWEST: Final = np.float32(-np.inf)


@cache
def _compiled(group: int, head_dim: int) -> Kernel:
    """For so many query heads on each KV head, and channels."""

    @kernel
    def tiled_attention(pointer):
        args = arguments(pointer)
        num_kv_heads, num_slots, q_stride = args[1], args[2], args[3]
        scale, soft_cap = np.float32(number(args[4])), np.float32(number(args[5]))
        plan = integers(args[8], 4)
        num_pieces, num_parts = plan[0], plan[1]
        pieces, parts = integers(plan[2], (num_pieces, 4)), integers(plan[3], (num_parts, 6))
        q = np.empty((MAX_ROWS * group, head_dim), np.float32)
        total = np.empty((MAX_ROWS * group, head_dim), np.float32)
        highest, sums = np.empty(MAX_ROWS * group, np.float32), np.empty(MAX_ROWS * group, np.float32)
        transposed = np.zeros((KEYS // PANEL, head_dim, PANEL), np.float32)
        scores = np.empty((MAX_TILE_ROWS, KEYS), np.float32)
        added = np.empty((MAX_TILE_ROWS, PANEL), np.float32)
        q_at, transposed_at = np.int64(q.ctypes.data), np.int64(transposed.ctypes.data)
        scores_at, added_at = np.int64(scores.ctypes.data), np.int64(added.ctypes.data)
        for item in range(thread_number(), num_pieces * num_kv_heads, num_threads()):
            head = item % num_kv_heads
            first_row, num_rows = pieces[item // num_kv_heads, 0], pieces[item // num_kv_heads, 1]
            first_part, end_part = pieces[item // num_kv_heads, 2], pieces[item // num_kv_heads, 3]
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
            for index in range(first_part, end_part):
                part_row, part_rows, slot = parts[index, 0], parts[index, 1], parts[index, 2]
                num_keys, is_causal, edge = parts[index, 3], parts[index, 4], parts[index, 5]
                for start in range(0, num_keys, KEYS):
                    count = min(KEYS, num_keys - start)
                    keys = floats(args[6] + 4 * (head * num_slots + slot + start) * head_dim, (count, head_dim))
                    values_at = args[7] + 4 * (head * num_slots + slot + start) * head_dim
                    values = floats(values_at, (count, head_dim))
                    for j in range(count):
                        for d in range(head_dim):
                            transposed[j // PANEL, d, j % PANEL] = keys[j, d]
                    row = part_row * group
                    end = (part_row + part_rows) * group
                    while row < end:
                        tile = 1
                        for rows in (3, 6, 12):
                            if rows <= MAX_TILE_ROWS and rows <= end - row:
                                tile = rows
                        # The last row of the tile sees most.
                        last = (row + tile - 1) // group - part_row
                        if is_causal and start >= num_keys - part_rows + last + 1:
                            row += tile
                            continue
                        source = q_at + 4 * row * head_dim
                        for panel in range((count + PANEL - 1) // PANEL):
                            target = scores_at + 4 * panel * PANEL
                            packed = transposed_at + 4 * panel * head_dim * PANEL
                            multiply_tile(tile, source, 4 * head_dim, packed, 4 * PANEL, head_dim, target, 4 * KEYS)
                        for r in range(tile):
                            own = (row + r) // group - part_row
                            low = max(0, own + edge - start)
                            high = count
                            if is_causal:
                                high = min(count, num_keys - part_rows + own + 1 - start)
                            if soft_cap > _ZERO:
                                for j in range(count):
                                    x = scores[r, j] / soft_cap
                                    scores[r, j] = soft_cap * (_ONE - _TWO / (exp(_TWO * x) + _ONE))
                            for j in range(min(low, count)):
                                scores[r, j] = _LOWEST
                            for j in range(count - max(0, high)):
                                scores[r, count - 1 - j] = _LOWEST
                            if low >= high:
                                for j in range(count):
                                    scores[r, j] = _ZERO
                                continue
                            top = highest[row + r]
                            for j in range(count):
                                top = larger(scores[r, j], top)
                            weight = _ZERO
                            for j in range(count):
                                x = exp(scores[r, j] - top)
                                scores[r, j] = x
                                weight += x
                            shrink = exp(highest[row + r] - top)
                            highest[row + r] = top
                            sums[row + r] = sums[row + r] * shrink + weight
                            for d in range(head_dim):
                                total[row + r, d] *= shrink
                        whole = count // UNROLL * UNROLL
                        if whole > 0:
                            for column in range(0, head_dim, PANEL):
                                panel_at = values_at + 4 * column
                                multiply_tile(
                                    tile, scores_at, 4 * KEYS, panel_at, 4 * head_dim, whole, added_at, 4 * PANEL
                                )
                                for r in range(tile):
                                    for i in range(PANEL):
                                        total[row + r, column + i] += added[r, i]
                        for j in range(whole, count):
                            for r in range(tile):
                                x = scores[r, j]
                                for d in range(head_dim):
                                    total[row + r, d] += x * values[j, d]
                        row += tile
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


class UnitPlan:
    """Units of a step, in pieces, for one window."""

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        pieces: list[tuple[int, int, int, int]] = []
        parts: list[tuple[int, int, int, int, int, int]] = []
        for unit in units:
            for piece in unit.cut(MAX_ROWS) if unit.num_rows > MAX_ROWS else (unit,):
                begin = len(parts)
                for part in piece.parts:
                    edge = _UNSEEN if part.edge is None else part.edge
                    parts.append(
                        (part.first_row, part.num_rows, part.first_slot, part.num_keys, int(part.is_causal), edge)
                    )
                pieces.append((piece.first_row, piece.num_rows, begin, len(parts)))
        self._columns = [array("q", chain.from_iterable(rows)) for rows in (pieces, parts)]
        self.addresses = array("q", [len(pieces), len(parts), *map(address_of, self._columns)])

    def take(self, other: UnitPlan) -> None:
        """Become this plan, in the place where recorded launches look for it."""
        self._columns = other._columns
        self.addresses[:] = other.addresses


def tiled_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    plan: UnitPlan,
    out: torch.Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
) -> None:
    """Attend with the units of the plan; arguments and errors as of `paged_attention`."""
    launch_attention(_compiled, q, kv, plan.addresses, out, softmax_scale, soft_cap, is_long=True)
