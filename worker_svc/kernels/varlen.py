"""How the attention kernels deal a step's sequences to programs.

A *unit* is up to BLOCK_Q queries of one sequence for TILE_HEADS query heads that share a KV head: the rows of one tile,
row = query * TILE_HEADS + head. A *split* is a program's share of a unit's keys (split-KV: Dao et al. 2023,
"Flash-Decoding"). Each program finds its sequence, unit and split from the lengths on the device, so that the host
needs only maxima and the launch can stand in a CUDA graph:

    tiles[b]  = ceil(keys that b's queries see / BLOCK_N),   units[b] = ceil(query_len[b] / BLOCK_Q)
    chunk     = max(MIN_SHARE / BLOCK_N, ceil(sum(units * tiles) / G))
    splits[b] = max(1, round(tiles[b] / chunk)),             programs[b] = units[b] * splits[b]

So programs get equal work whatever the mix of lengths, and short sequences are not split at all. The grid has U + G
programs for each head tile, which is at least sum(programs): U is the most units that the step's shapes allow, and G
as many as make WAVES programs a multiprocessor with all head tiles. G is 0, nothing is split and there is no second
kernel, where no sequence can be long enough, or U alone fills the device: with WAVES programs a multiprocessor for
tiles of 16 rows, which read much for what they compute; with one for tiles of 64 rows or more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import torch
import triton
import triton.language as tl

from weft.hashing import BLOCK_SIZE

FLOATS: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
StepKind = Literal["decode", "mixed", "prefill"]
# Two or three programs fit on a multiprocessor side by side; more than that evens out what differs between them.
WAVES: Final = 4
SLOTS: Final = tl.constexpr(BLOCK_SIZE)  # of a block
LOG2_E: Final = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class VarlenBatch:
    """Which rows of a step belong to which of B sequences, and where their keys are; all on the device.

    Sequences without queries pad a batch: nothing of theirs is read. A sequence's queries are its last tokens.
    """

    cu_seqlens_q: torch.Tensor  # [B + 1] int32: sequence b has the rows from [b] to [b + 1]
    seq_lens: torch.Tensor  # [B] int32: tokens after the step
    block_tables: torch.Tensor  # [B, M] int32: block ids in order; rows may be strided
    max_query_len: int  # no sequence has more queries
    max_seq_len: int  # no sequence has more tokens

    def __post_init__(self) -> None:
        num_sequences = len(self.seq_lens)
        check_tensor("seq_lens", self.seq_lens, (num_sequences,), torch.int32)
        check_tensor("cu_seqlens_q", self.cu_seqlens_q, (num_sequences + 1,), torch.int32)
        check_tensor("block_tables", self.block_tables, (num_sequences, self.block_tables.shape[-1]), torch.int32)
        if self.max_seq_len > self.block_tables.shape[1] * BLOCK_SIZE:
            raise ValueError(
                f"max_seq_len is {self.max_seq_len}, and block_tables has {self.block_tables.shape[1]} blocks"
            )
        if not 1 <= self.max_query_len <= self.max_seq_len:
            raise ValueError(f"max_query_len is {self.max_query_len}, expected 1 to max_seq_len, {self.max_seq_len}")


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless the tensor has this shape and dtype and its last dimension is contiguous."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, expected 1")


def check_positive(**numbers: float | None) -> None:
    """Raise ValueError unless every number that is given is positive."""
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise ValueError(f"{name} is {number}, expected it positive")


@dataclass(frozen=True, slots=True)
class Launch:
    """How a step is cut into programs, from shapes alone."""

    tile_heads: int  # query heads in a tile
    num_head_tiles: int  # of all heads
    num_units: int  # U, the most units a step of these shapes has
    num_extra: int  # G; 0 if nothing is split
    min_share: int  # keys of a split; with fewer it does not pay for its part of the merge
    block_q: int
    batch_size: int  # B, rounded up so that few kernels get compiled

    @property
    def num_programs(self) -> int:
        """For each head tile."""
        return self.num_units + self.num_extra

    def constants(self) -> dict[str, Any]:
        """Arguments of `locate`."""
        return {
            "NUM_HEAD_TILES": self.num_head_tiles,
            "TILE_HEADS": self.tile_heads,
            "BLOCK_Q": self.block_q,
            "NUM_EXTRA": self.num_extra,
            "MIN_SHARE": self.min_share,
            "BLOCK_B": self.batch_size,
        }


def plan_launch(
    batch: VarlenBatch, num_tokens: int, num_heads: int, num_kv_heads: int, block_m: int, window: int | None
) -> Launch:
    """Cut a step of `num_tokens` rows into units and splits.

    Args:
        block_m: rows of a tile.
    """
    num_sequences, group = len(batch.seq_lens), num_heads // num_kv_heads
    tile_heads = triton.cdiv(group, triton.cdiv(group, block_m))
    num_head_tiles = num_kv_heads * triton.cdiv(group, tile_heads)
    block_q = block_m // tile_heads
    num_units = min(num_sequences * triton.cdiv(batch.max_query_len, block_q), num_tokens // block_q + num_sequences)
    longest = batch.max_seq_len if window is None else min(batch.max_seq_len, window + block_q)
    # A row of partial sums costs as much as a key or two to write and to read.
    min_share = max(256, 8 * block_m)
    num_multi = num_multiprocessors(batch.seq_lens.device)
    is_full = num_units * num_head_tiles >= num_multi * max(WAVES * 16 // block_m, 1)
    can_split = longest >= 2 * min_share and not is_full
    return Launch(
        tile_heads=tile_heads,
        num_head_tiles=num_head_tiles,
        num_units=num_units,
        num_extra=max(WAVES * num_multi // num_head_tiles, 1) if can_split else 0,
        min_share=min_share,
        block_q=block_q,
        batch_size=max(triton.next_power_of_2(num_sequences), 128),
    )


def step_kind(batch: VarlenBatch, num_tokens: int, group: int) -> StepKind:
    """What bounds a step, from its shapes: reading keys for a few rows, both, or computing with many rows.

    Args:
        group: query heads of a KV head, which are rows of the same tile.
    """
    if batch.max_query_len * group <= 16:
        return "decode"
    return "prefill" if num_tokens * group >= 128 * len(batch.seq_lens) else "mixed"


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of the interpreter: two, so that it deals a little work to many programs as a device deals much."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """One sequence's softmax(q k^T scale) v in float64.

    Args:
        q: [n, H, Dk]; of the last n tokens.
        k: [s, KH, Dk].
        v: [s, KH, Dv].

    Returns:
        [n, H, Dv] float64.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q.double(), k) * softmax_scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    keys = torch.arange(len(k), device=q.device)
    queries = keys[len(k) - len(q) :, None]
    unseen = keys > queries
    if window is not None:
        unseen |= keys <= queries - window
    return torch.einsum("hns,shd->nhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def sequence_slots(batch: VarlenBatch, sequence: int) -> torch.Tensor:
    """Slots of a sequence's tokens in order, for references. Returns [s] int64."""
    positions = torch.arange(int(batch.seq_lens[sequence]), device=batch.seq_lens.device)
    return batch.block_tables[sequence, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def deal(
    cu_seqlens_ptr,
    seq_lens_ptr,
    num_sequences,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Of each sequence: its last row + 1, its units, and how many splits each of them has; [BLOCK_B] int32."""
    index = tl.arange(0, BLOCK_B)
    is_real = index < num_sequences
    starts = tl.load(cu_seqlens_ptr + index, mask=is_real, other=0)
    ends = tl.load(cu_seqlens_ptr + 1 + index, mask=is_real, other=0)
    units = (ends - starts + BLOCK_Q - 1) // BLOCK_Q
    splits = tl.full([BLOCK_B], 1, tl.int32)
    if NUM_EXTRA > 0:
        seen = tl.load(seq_lens_ptr + index, mask=is_real, other=0)
        if WINDOW is not None:
            seen = tl.minimum(seen, WINDOW + BLOCK_Q)
        tiles = (seen + BLOCK_N - 1) // BLOCK_N
        total = tl.sum(units * tiles, 0)
        chunk = tl.maximum((total + NUM_EXTRA - 1) // NUM_EXTRA, MIN_SHARE // BLOCK_N)
        splits = tl.maximum((tiles + chunk // 2) // chunk, 1)
    # Padding after the last sequence ends beyond every row.
    return tl.where(is_real, ends, 2147483647), units, splits


@triton.jit
def locate(
    program,
    cu_seqlens_ptr,
    seq_lens_ptr,
    num_sequences,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """What a program works on. The late queries of a sequence, which see most, come first.

    Returns:
        The sequence, its first row, its number of queries and of tokens before them; the unit's first query; the first
        key that the unit sees; the keys of this split from `begin`, a multiple of BLOCK_N, to `end`; the unit's number
        of splits. No queries if there is no work for this program.
    """
    ends, units, splits = deal(
        cu_seqlens_ptr, seq_lens_ptr, num_sequences, WINDOW, BLOCK_N, BLOCK_Q, NUM_EXTRA, MIN_SHARE, BLOCK_B
    )
    programs = units * splits
    is_before = tl.cumsum(programs, 0) <= program
    sequence = tl.sum(is_before.to(tl.int32), 0)
    local = program - tl.sum(tl.where(is_before, programs, 0), 0)
    is_real = sequence < num_sequences
    first_row = tl.load(cu_seqlens_ptr + sequence, mask=is_real, other=0)
    query_len = tl.load(cu_seqlens_ptr + 1 + sequence, mask=is_real, other=0) - first_row
    context = tl.load(seq_lens_ptr + sequence, mask=is_real, other=0) - query_len
    num_splits = tl.max(tl.where(tl.arange(0, BLOCK_B) == sequence, splits, 1), 0)
    first_query = ((query_len + BLOCK_Q - 1) // BLOCK_Q - 1 - local // num_splits) * BLOCK_Q
    stop = context + tl.minimum(first_query + BLOCK_Q, query_len)
    first_key = 0
    if WINDOW is not None:
        first_key = tl.maximum(context + first_query - WINDOW + 1, 0)
    first_tile = first_key // BLOCK_N
    share = ((stop + BLOCK_N - 1) // BLOCK_N - first_tile + num_splits - 1) // num_splits
    begin = (first_tile + local % num_splits * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, stop)
    return sequence, first_row, query_len, context, first_query, first_key, begin, end, num_splits


@triton.jit
def key_blocks(start, end, table_ptr, BLOCK_N: tl.constexpr):
    """Blocks that hold the BLOCK_N keys from `start`, a multiple of it; 0 past `end`. Returns [BLOCK_N] int32."""
    keys = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + keys // SLOTS, mask=keys < end, other=0)


@triton.jit
def zero_unowned_rows(out_ptr, num_owned, num_tokens, ROW_SIZE: tl.constexpr):
    """Zeros for the rows from `num_owned`, which pad a step in a CUDA graph."""
    CHUNK: tl.constexpr = 1024
    stop = num_tokens.to(tl.int64) * ROW_SIZE
    start = num_owned.to(tl.int64) * ROW_SIZE + tl.program_id(0) * CHUNK
    for offset in range(start, stop, tl.num_programs(0) * CHUNK):
        elements = offset + tl.arange(0, CHUNK)
        tl.store(out_ptr + elements, tl.zeros([CHUNK], out_ptr.dtype.element_ty), mask=elements < stop)
