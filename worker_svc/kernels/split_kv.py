"""The inner step of flash attention, and the merge of what several programs computed for the same rows (split-KV).

    online softmax: with each tile of keys
                        peak' = max(peak, scores),  w = 2^(scores - peak'),  decay = 2^(peak - peak')
                    and the sums of w v and w over earlier tiles are multiplied with decay
    merge:          out = sum over splits of 2^lse partial / sum over splits of 2^lse,  lse = peak + log2(sum(w))

Dao et al. 2022, "FlashAttention"; Dao et al. 2023, "Flash-Decoding". Everything is float32, scores in units of log2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from worker_svc.kernels.varlen import Launch, VarlenBatch, deal


@triton.jit
def online_softmax(scores, factor, peak, total):
    """Weights of one more tile of keys, 2^(scores * factor - peak); masked scores are -inf.

    Args:
        scores: [rows, keys] float32.
        peak, total: [rows] float32, the largest score times factor and the sum of the weights, -inf and 0 at first.

    Returns:
        The weights [rows, keys], what earlier sums are to be multiplied with [rows], the new peak and total.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    # Of a row that has seen no key yet, -inf - -inf would not be a number.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * factor - base[:, None])
    decay = tl.exp2(peak - base)
    return weights, decay, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def store_tile(
    acc,
    peak,
    total,
    tokens,
    heads,
    is_valid,
    num_splits,
    out_ptr,
    partial_ptr,
    lse_ptr,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """Write a program's rows: to the output, or for the merge if there are more splits.

    Args:
        acc: [BLOCK_M, BLOCK_D] float32, the sum of weights times values.
        tokens, heads, is_valid: [BLOCK_M].
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    columns = tl.arange(0, acc.shape[1])[None, :]
    mask = is_valid[:, None] & (columns < VALUE_DIM)
    values = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if num_splits == 1:
        rows = tokens.to(tl.int64) * NUM_HEADS + heads
        tl.store(out_ptr + rows[:, None] * VALUE_DIM + columns, values.to(out_ptr.dtype.element_ty), mask=mask)
    elif partial_ptr is not None:
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial_ptr + rows[:, None] * VALUE_DIM + columns, values, mask=mask)
        tl.store(lse_ptr + rows, peak + tl.log2(total), mask=is_valid)


@triton.jit(do_not_specialize=["num_sequences"])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    num_sequences,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_HEAD_TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the output, from its splits: sum(2^lse * partial) / sum(2^lse)."""
    token = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    ends, units, splits = deal(
        cu_seqlens_ptr, seq_lens_ptr, num_sequences, WINDOW, BLOCK_N, BLOCK_Q, NUM_EXTRA, MIN_SHARE, BLOCK_B
    )
    is_before = ends <= token
    sequence = tl.sum(is_before.to(tl.int32), 0)
    is_own = tl.arange(0, BLOCK_B) == sequence
    num_splits = tl.sum(tl.where(is_own, splits, 0), 0)
    if (sequence >= num_sequences) | (num_splits <= 1):
        return
    query = token - tl.load(cu_seqlens_ptr + sequence)
    unit = tl.sum(tl.where(is_own, units, 0), 0) - 1 - query // BLOCK_Q
    program = tl.sum(tl.where(is_before, units * splits, 0), 0) + unit * num_splits
    group_tile = head % GROUP // TILE_HEADS
    head_tile = head // GROUP * tl.cdiv(GROUP, TILE_HEADS) + group_tile
    row = query % BLOCK_Q * TILE_HEADS + head % GROUP - group_tile * TILE_HEADS

    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)
        is_split = index < num_splits
        rows = ((program + index).to(tl.int64) * NUM_HEAD_TILES + head_tile) * BLOCK_M + row
        lse = tl.load(lse_ptr + rows, mask=is_split, other=float("-inf"))
        mask = is_split[:, None] & (columns < VALUE_DIM)[None, :]
        partial = tl.load(partial_ptr + rows[:, None] * VALUE_DIM + columns[None, :], mask=mask, other=0.0)
        # A row's first splits may lie before its window, and hold nothing.
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(lse - base)
        decay = tl.exp2(peak - base)
        acc = acc * decay + tl.sum(partial * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        peak = new_peak
    row_start = out_ptr + tl.program_id(0).to(tl.int64) * VALUE_DIM
    tl.store(row_start + columns, (acc / total).to(out_ptr.dtype.element_ty), mask=columns < VALUE_DIM)


def allocate_partials(
    launch: Launch, block_m: int, value_dim: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for each program's rows and the logarithm of each row's sum; nothing if no sequence can be split."""
    if launch.num_extra == 0:
        return None, None
    num_rows = launch.num_programs * launch.num_head_tiles * block_m
    partial = torch.empty(num_rows, value_dim, dtype=torch.float32, device=device)
    return partial, torch.empty(num_rows, dtype=torch.float32, device=device)


def merge_splits(
    partials: tuple[torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
    batch: VarlenBatch,
    launch: Launch,
    blocks: dict[str, int],
    constants: dict[str, Any],
) -> None:
    """Write the rows of `out`, [T, H * Dv] or [T, H, Dv], whose sequences were split.

    Args:
        blocks, constants: of the kernel that wrote the partials.
    """
    if partials[0] is None:
        return
    num_rows, value_dim = out.numel() // partials[0].shape[1], partials[0].shape[1]
    block_d = min(triton.next_power_of_2(value_dim), 128)
    _merge_kernel[(num_rows, triton.cdiv(value_dim, block_d))](
        *partials,
        out,
        batch.cu_seqlens_q,
        batch.seq_lens,
        len(batch.seq_lens),
        VALUE_DIM=value_dim,
        BLOCK_M=blocks["BLOCK_M"],
        BLOCK_N=blocks["BLOCK_N"],
        BLOCK_S=32,
        BLOCK_D=block_d,
        **constants,
        **launch.constants(),
        num_warps=4,
    )
