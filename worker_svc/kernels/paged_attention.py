"""Paged attention (Kwon et al. 2023) of a whole step, prefill chunks and decodes in one launch.

    out[t, h] = sum over j of softmax_j(cap(softmax_scale * q[t, h] . k[j, h // group])) v[j, h // group]

over the tokens j of t's sequence with position[t] - window < j <= position[t]; cap(s) = soft_cap * tanh(s / soft_cap)
if there is one (Gemma 2). q is [T, H, D], the cache of a layer [2 * KH, N * S, D], heads of K before heads of V.

Flash attention (Dao 2023) over tiles of BLOCK_N keys, gathered by block table; the group = H / KH query heads of a KV
head are rows of the same tile, so K and V are read once for all of them. Sums are float32, also of bfloat16 and
float16; an int8 or float8_e4m3fn cache has one float32 scale per slot and head, K's goes into the scores and V's into
the weights. Tiles that no row sees are skipped, and memory that no sequence owns is not read, whatever is in it.
`varlen` says how sequences are dealt to programs, and when a sequence's keys are split.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from weft.hashing import BLOCK_SIZE
from worker_svc.kernels.split_kv import allocate_partials, merge_splits, online_softmax, store_tile
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import (
    FLOATS,
    LOG2_E,
    SLOTS,
    StepKind,
    VarlenBatch,
    attend_reference,
    check_positive,
    check_tensor,
    key_blocks,
    locate,
    plan_launch,
    sequence_slots,
    step_kind,
    zero_unowned_rows,
)

QUANTIZED: Final = frozenset({torch.int8, torch.float8_e4m3fn})


def paged_attention_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    batch: VarlenBatch,
    *,
    softmax_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in float64, sequence by sequence. Arguments and result as of `paged_attention`."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rows = batch.cu_seqlens_q.tolist()
    for sequence, (start, stop) in enumerate(zip(rows[:-1], rows[1:], strict=True)):
        if start == stop:
            continue
        slots = sequence_slots(batch, sequence)
        gathered = kv[:, slots].double()
        if kv_scales is not None:
            gathered *= kv_scales[:, slots, None]
        k, v = gathered.transpose(0, 1).chunk(2, dim=1)
        out[start:stop] = attend_reference(q[start:stop], k, v, softmax_scale, window, soft_cap).to(q.dtype)
    return out.flatten(1)


@triton.jit
def _seen_by_all(
    context, first_query, query_len, begin, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr
):
    """First and last + 1 of the keys from `begin` that every row of a unit sees, in whole tiles; may be none."""
    start = begin
    if WINDOW is not None:
        last = context + tl.minimum(first_query + BLOCK_Q, query_len) - 1
        start = tl.maximum((last - WINDOW + BLOCK_N) // BLOCK_N * BLOCK_N, begin)
    return start, tl.maximum((context + first_query + 1) // BLOCK_N * BLOCK_N, start)


@triton.jit
def _attend_tiles(
    q,
    state,
    begin,
    end,
    first_key,
    positions,
    cache,
    scales,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Go on with keys `begin` to `end`. Unless IS_MASKED, these are whole tiles of which every row sees every key."""
    acc, peak, total = state
    k_ptr, v_ptr, table_ptr, stride_slot = cache
    columns = tl.arange(0, q.shape[1])[None, :]
    # Read one tile ahead, so that the loads of K and V that depend on it run as far ahead as there are stages.
    blocks = key_blocks(begin, end, table_ptr, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        keys = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        slots = blocks.to(tl.int64) * SLOTS + keys % SLOTS
        blocks = key_blocks(start + BLOCK_N, end, table_ptr, BLOCK_N)
        is_read = tl.full([BLOCK_N], True, tl.int1)
        if IS_MASKED:
            is_read = keys < end
            if WINDOW is not None:
                is_read &= keys >= first_key
        offsets = slots[:, None] * stride_slot + columns
        mask = is_read[:, None] & (columns < HEAD_DIM)
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        if scales is not None:
            k = k.to(tl.float32).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = softmax_scale * LOG2_E
        if scales is not None:
            scores *= tl.load(scales[0] + slots, mask=is_read, other=0.0)[None, :]
        if SOFT_CAP is not None:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both infinities.
            scores = 1.0 - 2.0 / (tl.exp2(scores * (factor * (2.0 / SOFT_CAP))) + 1.0)
            factor = SOFT_CAP * LOG2_E
        if IS_MASKED:
            is_seen = is_read[None, :] & (keys[None, :] <= positions[:, None])
            if WINDOW is not None:
                is_seen &= keys[None, :] > positions[:, None] - WINDOW
            scores = tl.where(is_seen, scores, float("-inf"))
        weights, decay, peak, total = online_softmax(scores, factor, peak, total)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        if scales is not None:
            v = v.to(tl.float32).to(q.dtype)
            weights *= tl.load(scales[1] + slots, mask=is_read, other=0.0)[None, :]
        acc = tl.dot(weights.to(q.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "table_stride"])
def _paged_attention_kernel(
    q_ptr,
    kv_ptr,
    scales_ptr,
    block_tables_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    num_tokens,
    num_sequences,
    table_stride,
    q_stride_token,
    q_stride_head,
    kv_stride_head,
    kv_stride_slot,
    scales_stride,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    NUM_HEAD_TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One unit and split for TILE_HEADS heads."""
    num_owned = tl.load(cu_seqlens_ptr + num_sequences)
    program = tl.program_id(0) // NUM_HEAD_TILES
    head_tile = tl.program_id(0) % NUM_HEAD_TILES
    sequence, first_row, query_len, context, first_query, first_key, begin, end, num_splits = locate(
        program, cu_seqlens_ptr, seq_lens_ptr, num_sequences, WINDOW, BLOCK_N, BLOCK_Q, NUM_EXTRA, MIN_SHARE, BLOCK_B
    )
    zero_unowned_rows(out_ptr, num_owned, num_tokens, NUM_HEADS * HEAD_DIM)
    if query_len == 0:
        return
    TILES_OF_GROUP: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    kv_head = (head_tile // TILES_OF_GROUP).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // TILE_HEADS
    group_heads = head_tile % TILES_OF_GROUP * TILE_HEADS + rows % TILE_HEADS
    heads = head_tile // TILES_OF_GROUP * GROUP + group_heads
    is_valid = (rows < BLOCK_Q * TILE_HEADS) & (queries < query_len) & (group_heads < GROUP)
    # A row of padding sees what the first row sees: all of its numbers stay finite.
    positions = context + tl.where(is_valid, queries, first_query)

    columns = tl.arange(0, BLOCK_D)[None, :]
    q_offsets = (first_row + queries).to(tl.int64) * q_stride_token + heads * q_stride_head
    q_mask = is_valid[:, None] & (columns < HEAD_DIM)
    q = tl.load(q_ptr + q_offsets[:, None] + columns, mask=q_mask, other=0.0)
    k_ptr = kv_ptr + kv_head * kv_stride_head
    v_ptr = k_ptr + (NUM_HEADS // GROUP) * kv_stride_head.to(tl.int64)
    cache = (k_ptr, v_ptr, block_tables_ptr + sequence.to(tl.int64) * table_stride, kv_stride_slot)
    scales = None
    if scales_ptr is not None:
        k_scale_ptr = scales_ptr + kv_head * scales_stride
        scales = (k_scale_ptr, k_scale_ptr + (NUM_HEADS // GROUP) * scales_stride.to(tl.int64))

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), peak, tl.zeros([BLOCK_M], tl.float32))
    # A small tile reads for longer than it computes, and may mask all of it. A large one computes for longer.
    start = begin
    if BLOCK_M >= 64:
        all_seen, start = _seen_by_all(context, first_query, query_len, begin, WINDOW, BLOCK_Q, BLOCK_N)
        if WINDOW is not None:
            state = _attend_tiles(
                q, state, begin, tl.minimum(all_seen, end), first_key, positions, cache, scales, softmax_scale,
                HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_N, True,
            )  # fmt: skip
        state = _attend_tiles(
            q, state, all_seen, tl.minimum(start, end), first_key, positions, cache, scales, softmax_scale,
            HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_N, False,
        )  # fmt: skip
    acc, peak, total = _attend_tiles(
        q, state, start, end, first_key, positions, cache, scales, softmax_scale,
        HEAD_DIM, WINDOW, SOFT_CAP, BLOCK_N, True,
    )  # fmt: skip
    store_tile(
        acc, peak, total, first_row + queries, heads, is_valid, num_splits, out_ptr, partial_ptr, lse_ptr,
        NUM_HEADS, HEAD_DIM,
    )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    batch: VarlenBatch,
    *,
    softmax_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Attention of a step's T tokens, rows of one sequence after those of another.

    Args:
        q: [T, H, D]; rows and heads may be strided, as in a view of [T, (H + 2 * KH) * D].
        kv: [2 * KH, N * S, D] of q's dtype, int8 or float8_e4m3fn; one layer's cache, the step's own tokens in it.
        softmax_scale: positive.
        window: tokens that a query sees, itself included; None for all.
        kv_scales: [2 * KH, N * S] float32, of an int8 or float8_e4m3fn cache.
        config: block sizes, when they are tuned.

    Returns:
        [T, H * D] of q's dtype. Rows after the last sequence's are zero.

    Raises:
        ValueError: a shape, dtype or stride is not as above; names the tensor.
    """
    check_positive(softmax_scale=softmax_scale, window=window, soft_cap=soft_cap)
    _check(q, kv, kv_scales)
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, len(kv) // 2
    if config is None:
        kind = step_kind(batch, num_tokens, num_heads // num_kv_heads)
        default = default_config(kind, head_dim, q.dtype)
        config = choose("paged_attention", tuning_key(kind, head_dim, kv.dtype), default, q.device)
    launch = plan_launch(batch, num_tokens, num_heads, num_kv_heads, config.blocks["BLOCK_M"], window)
    out = q.new_empty(num_tokens, num_heads * head_dim)
    partials = allocate_partials(launch, config.blocks["BLOCK_M"], head_dim, q.device)
    shape = {"NUM_HEADS": num_heads, "GROUP": num_heads // num_kv_heads, "WINDOW": window}
    _paged_attention_kernel[(launch.num_programs * launch.num_head_tiles,)](
        q,
        kv,
        kv_scales,
        batch.block_tables,
        batch.cu_seqlens_q,
        batch.seq_lens,
        out,
        *partials,
        num_tokens,
        len(batch.seq_lens),
        batch.block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(1),
        0 if kv_scales is None else kv_scales.stride(0),
        softmax_scale,
        HEAD_DIM=head_dim,
        SOFT_CAP=soft_cap,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        **shape,
        **launch.constants(),
        **config.arguments(),
    )
    merge_splits(partials, out, batch, launch, config.blocks, shape)
    return out


def default_config(kind: StepKind, head_dim: int, dtype: torch.dtype) -> Config:
    """Block sizes for a GPU like the H100, with 227 KB of shared memory and 255 registers a thread.

    Args:
        dtype: of q.
    """
    if dtype == torch.float32:
        # Products in float32 are not made by tensor cores: small tiles keep their operands in registers.
        small = {"decode": {"BLOCK_M": 16, "BLOCK_N": 32}}.get(kind, {"BLOCK_M": 32, "BLOCK_N": 16})
        return Config(small, num_warps=8, num_stages=2)
    block_n = 64 if head_dim <= 128 else 32
    if kind == "decode":
        return Config({"BLOCK_M": 16, "BLOCK_N": block_n}, num_warps=4, num_stages=3)
    if kind == "mixed" and head_dim <= 128:
        return Config({"BLOCK_M": 64, "BLOCK_N": block_n}, num_warps=4, num_stages=3)
    return Config({"BLOCK_M": 128, "BLOCK_N": block_n}, num_warps=8, num_stages=3)


def tuning_key(kind: StepKind, head_dim: int, kv_dtype: torch.dtype) -> str:
    """What the best block sizes depend on."""
    return f"{kind} D{head_dim} {str(kv_dtype).removeprefix('torch.')}"


def _check(q: torch.Tensor, kv: torch.Tensor, kv_scales: torch.Tensor | None) -> None:
    if q.dim() != 3 or kv.dim() != 3:
        raise ValueError(
            f"q and kv have shapes {tuple(q.shape)} and {tuple(kv.shape)}, expected [T, H, D] and [2 KH, N S, D]"
        )
    (num_tokens, num_heads, head_dim), (num_kv, num_slots, _) = q.shape, kv.shape
    check_tensor("q", q, (num_tokens, num_heads, head_dim))
    if q.dtype not in FLOATS:
        raise ValueError(f"q is {q.dtype}, expected float32, bfloat16 or float16")
    if num_kv == 0 or num_kv % 2 or num_heads % (num_kv // 2):
        raise ValueError(f"kv has {num_kv} heads of K and V, expected twice a divisor of q's {num_heads}")
    if num_slots % BLOCK_SIZE:
        raise ValueError(f"kv has {num_slots} slots, expected a multiple of {BLOCK_SIZE}")
    is_quantized = kv.dtype in QUANTIZED
    check_tensor("kv", kv, (num_kv, num_slots, head_dim), kv.dtype if is_quantized else q.dtype)
    if is_quantized != (kv_scales is not None):
        raise ValueError(
            f"kv is {kv.dtype}, expected kv_scales {'with it' if is_quantized else 'only with int8 or fp8'}"
        )
    if kv_scales is not None:
        check_tensor("kv_scales", kv_scales, (num_kv, num_slots), torch.float32)
