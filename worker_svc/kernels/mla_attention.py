"""Multi-head latent attention of a whole step, in the absorbed form (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).

    out[t, h] = sum over j of softmax_j(softmax_scale * q[t, h] . cache[j]) latent[j]

over the tokens j of t's sequence up to t. A token's cache is its latent of R = kv_lora_rank numbers, then its rotary
key of P = qk_rope_head_dim: cache [N * S, R + P]. All heads share it. q is [T, H, R + P], its first part already
multiplied with the keys' up-projection; the output [T, H, R] still wants the values'. Sums are float32.

As `paged_attention`, with two differences: heads are many, so that a tile may hold a part of them; and the latent is
key and value in one, read once, so that its product with q and that of the rotary parts are taken apart.
"""

from __future__ import annotations

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


def mla_attention_reference(
    q: torch.Tensor, cache: torch.Tensor, batch: VarlenBatch, *, latent_dim: int, softmax_scale: float
) -> torch.Tensor:
    """The formula in float64, sequence by sequence. Arguments and result as of `mla_attention`."""
    out = q.new_zeros(*q.shape[:2], latent_dim)
    rows = batch.cu_seqlens_q.tolist()
    for sequence, (start, stop) in enumerate(zip(rows[:-1], rows[1:], strict=True)):
        if start == stop:
            continue
        keys = cache[sequence_slots(batch, sequence), None]  # [s, 1, R + P]
        out[start:stop] = attend_reference(q[start:stop], keys, keys[..., :latent_dim], softmax_scale).to(q.dtype)
    return out


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "table_stride"])
def _mla_attention_kernel(
    q_ptr,
    cache_ptr,
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
    cache_stride_slot,
    softmax_scale,
    NUM_HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    NUM_HEAD_TILES: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One unit and split for TILE_HEADS heads."""
    num_owned = tl.load(cu_seqlens_ptr + num_sequences)
    program = tl.program_id(0) // NUM_HEAD_TILES
    sequence, first_row, query_len, context, first_query, _, begin, end, num_splits = locate(
        program, cu_seqlens_ptr, seq_lens_ptr, num_sequences, None, BLOCK_N, BLOCK_Q, NUM_EXTRA, MIN_SHARE, BLOCK_B
    )
    zero_unowned_rows(out_ptr, num_owned, num_tokens, NUM_HEADS * LATENT_DIM)
    if query_len == 0:
        return
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // TILE_HEADS
    heads = tl.program_id(0) % NUM_HEAD_TILES * TILE_HEADS + rows % TILE_HEADS
    is_valid = (rows < BLOCK_Q * TILE_HEADS) & (queries < query_len) & (heads < NUM_HEADS)
    # A row of padding sees what the first row sees: all of its numbers stay finite.
    positions = context + tl.where(is_valid, queries, first_query)

    q_rows_ptr = q_ptr + ((first_row + queries).to(tl.int64) * q_stride_token + heads * q_stride_head)[:, None]
    latent_columns = tl.arange(0, BLOCK_R)[None, :]
    rope_columns = tl.arange(0, BLOCK_P)[None, :]
    latent_mask = is_valid[:, None] & (latent_columns < LATENT_DIM)
    rope_mask = is_valid[:, None] & (rope_columns < ROPE_DIM)
    q_latent = tl.load(q_rows_ptr + latent_columns, mask=latent_mask, other=0.0)
    q_rope = tl.load(q_rows_ptr + LATENT_DIM + rope_columns, mask=rope_mask, other=0.0)
    table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Read one tile ahead, so that the loads that depend on it run as far ahead as there are stages.
    blocks = key_blocks(begin, end, table_ptr, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        keys = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        rows_ptr = cache_ptr + (blocks.to(tl.int64) * SLOTS + keys % SLOTS)[:, None] * cache_stride_slot
        blocks = key_blocks(start + BLOCK_N, end, table_ptr, BLOCK_N)
        is_read = (keys < end)[:, None]
        latent = tl.load(rows_ptr + latent_columns, mask=is_read & (latent_columns < LATENT_DIM), other=0.0)
        rope = tl.load(rows_ptr + LATENT_DIM + rope_columns, mask=is_read & (rope_columns < ROPE_DIM), other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
        is_seen = (keys < end)[None, :] & (keys[None, :] <= positions[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        weights, decay, peak, total = online_softmax(scores, softmax_scale * LOG2_E, peak, total)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
    store_tile(
        acc, peak, total, first_row + queries, heads, is_valid, num_splits, out_ptr, partial_ptr, lse_ptr,
        NUM_HEADS, LATENT_DIM,
    )  # fmt: skip


def mla_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    batch: VarlenBatch,
    *,
    latent_dim: int,
    softmax_scale: float,
    config: Config | None = None,
) -> torch.Tensor:
    """Latent attention of a step's T tokens, rows of one sequence after those of another.

    Args:
        q: [T, H, R + P]; rows and heads may be strided.
        cache: [N * S, R + P] of q's dtype; one layer's cache, the step's own tokens in it. Rows may be strided.
        latent_dim: R.
        softmax_scale: positive.
        config: block sizes, when they are tuned.

    Returns:
        [T, H, R] of q's dtype. Rows after the last sequence's are zero.

    Raises:
        ValueError: a shape, dtype or stride is not as above; names the tensor.
    """
    check_positive(softmax_scale=softmax_scale)
    _check(q, cache, latent_dim)
    num_tokens, num_heads, key_dim = q.shape
    if config is None:
        kind = step_kind(batch, num_tokens, num_heads)
        default = default_config(kind, q.dtype)
        config = choose("mla_attention", tuning_key(kind, num_heads, q.dtype), default, q.device)
    launch = plan_launch(batch, num_tokens, num_heads, 1, config.blocks["BLOCK_M"], None)
    out = q.new_empty(num_tokens, num_heads, latent_dim)
    partials = allocate_partials(launch, config.blocks["BLOCK_M"], latent_dim, q.device)
    _mla_attention_kernel[(launch.num_programs * launch.num_head_tiles,)](
        q,
        cache,
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
        cache.stride(0),
        softmax_scale,
        NUM_HEADS=num_heads,
        LATENT_DIM=latent_dim,
        ROPE_DIM=key_dim - latent_dim,
        BLOCK_R=max(triton.next_power_of_2(latent_dim), 16),
        BLOCK_P=max(triton.next_power_of_2(key_dim - latent_dim), 16),
        **launch.constants(),
        **config.arguments(),
    )
    merge_splits(
        partials, out, batch, launch, config.blocks, {"NUM_HEADS": num_heads, "GROUP": num_heads, "WINDOW": None}
    )
    return out


def default_config(kind: StepKind, dtype: torch.dtype) -> Config:
    """Block sizes for R = 512 on a GPU like the H100, with 227 KB of shared memory and 255 registers a thread."""
    if dtype == torch.float32:
        # Products in float32 are not made by tensor cores: small tiles keep their operands in registers.
        return Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8, num_stages=2)
    if kind == "decode":
        return Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=3)
    # Sums of 64 rows by 512 do not fit the registers beside what else a thread holds.
    return Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8, num_stages=2)


def tuning_key(kind: StepKind, num_heads: int, dtype: torch.dtype) -> str:
    """What the best block sizes depend on."""
    return f"{kind} H{num_heads} {str(dtype).removeprefix('torch.')}"


def _check(q: torch.Tensor, cache: torch.Tensor, latent_dim: int) -> None:
    if q.dim() != 3 or cache.dim() != 2:
        raise ValueError(
            f"q and cache have shapes {tuple(q.shape)}, {tuple(cache.shape)}, expected [T, H, R + P], [N S, R + P]"
        )
    check_tensor("q", q, tuple(q.shape))
    if q.dtype not in FLOATS:
        raise ValueError(f"q is {q.dtype}, expected float32, bfloat16 or float16")
    check_tensor("cache", cache, (len(cache), q.shape[2]), q.dtype)
    if len(cache) % BLOCK_SIZE:
        raise ValueError(f"cache has {len(cache)} slots, expected a multiple of {BLOCK_SIZE}")
    if not 0 < latent_dim < q.shape[2]:
        raise ValueError(f"latent_dim is {latent_dim}, expected it between 0 and q's {q.shape[2]}")
