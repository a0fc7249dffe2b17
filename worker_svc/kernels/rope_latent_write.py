"""What stands between the matmuls and `mla_attention`: rotary positions, and what the cache keeps of a token.

For each token t with slot s >= 0, whose cache row is its latent [R], then its rotary key [P]:

    q[t, h, R:]   = turns[t] * q[t, h, R:]     in place, of every head h
    cache[s, :R]  = latent[t]
    cache[s, R:]  = turns[t] * key[t]

Pairs of channels (2i, 2i + 1) turn as complex numbers (Su et al. 2021), in float32, rounded once when they are stored;
their turns are made as for `rope_kv_write`. Latents are cached as they come, normed before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor

# 16 heads of DeepSeek-V2's 64 channels a program: 9 programs a token of its 128 heads, one of them for the cache.
DEFAULT = Config({"BLOCK": 1024}, num_warps=4)


def rope_latent_write_reference(
    q: torch.Tensor,
    latent: torch.Tensor,
    key: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """`rope_latent_write` in plain torch."""
    rank, is_real = latent.shape[1], slots >= 0
    q[is_real, :, rank:] = _turned_reference(q[..., rank:], turns)[is_real].to(q.dtype)
    kept = torch.cat([latent.float(), _turned_reference(key[:, None], turns)[:, 0]], dim=1)
    cache[slots[is_real]] = kept[is_real].to(cache.dtype)


def _turned_reference(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """`x`: [T, heads, P]; returns float32."""
    pairs = torch.view_as_complex(x.float().contiguous().view(*x.shape[:2], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(turns.contiguous())[:, None]).flatten(-2)


@triton.jit
def _turn(x, turns, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """`x`: [ROWS, SIZE] float32; `turns`: [SIZE], a cosine and a sine for each pair."""
    cosine, sine = tl.split(tl.reshape(turns, (1, SIZE // 2, 2)))
    real, imaginary = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return tl.reshape(turned, (ROWS, SIZE))


@triton.jit
def _rope_latent_write_kernel(
    q_ptr,
    latent_ptr,
    key_ptr,
    turns_ptr,
    slots_ptr,
    cache_ptr,
    q_stride_token,
    q_stride_head,
    latent_stride,
    key_stride,
    NUM_HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The cache's row of one token, or some heads of its q: BLOCK // BLOCK_P of them."""
    BLOCK_HEADS: tl.constexpr = BLOCK // BLOCK_P
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    channels = tl.arange(0, BLOCK_P)
    is_used = channels < ROPE_DIM
    turns = tl.load(turns_ptr + token * ROPE_DIM + channels, mask=is_used, other=0.0)
    if tl.program_id(1) == 0:
        ranks = tl.arange(0, BLOCK_R)
        cache_ptr += slot * (LATENT_DIM + ROPE_DIM)
        latent = tl.load(latent_ptr + token * latent_stride + ranks, mask=ranks < LATENT_DIM, other=0.0)
        tl.store(cache_ptr + ranks, latent.to(cache_ptr.dtype.element_ty), mask=ranks < LATENT_DIM)
        key = tl.load(key_ptr + token * key_stride + channels, mask=is_used, other=0.0)[None, :]
        turned = _turn(key.to(tl.float32), turns, 1, BLOCK_P)
        key_ptrs = cache_ptr + LATENT_DIM + channels[None, :]
        tl.store(key_ptrs, turned.to(cache_ptr.dtype.element_ty), mask=is_used[None, :])
    else:
        heads = (tl.program_id(1) - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < NUM_HEADS)[:, None] & is_used[None, :]
        q_ptrs = q_ptr + token * q_stride_token + heads[:, None] * q_stride_head + LATENT_DIM + channels[None, :]
        x = tl.load(q_ptrs, mask=mask, other=0.0)
        tl.store(q_ptrs, _turn(x.to(tl.float32), turns, BLOCK_HEADS, BLOCK_P).to(x.dtype), mask=mask)


def rope_latent_write(
    q: torch.Tensor,
    latent: torch.Tensor,
    key: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Rotate q and the shared key, and put latent and key into the cache.

    Args:
        q: [T, H, R + P]; tokens and heads may be strided. The last P channels are overwritten.
        latent: [T, R]; rows may be strided.
        key: [T, P]; rows may be strided.
        turns: [T, P / 2, 2] float32, contiguous: cosine and sine of each pair's angle, that of the token's position.
        slots: [T] int64; below 0 for rows that pad a CUDA graph, of which nothing is written.
        cache: [N * S, R + P], contiguous.
        config: None for the one that `tuning` has.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    _check(q, latent, key, turns, slots, cache)
    num_tokens, num_heads = q.shape[:2]
    if num_tokens == 0:
        return
    block_p = triton.next_power_of_2(key.shape[1])
    config = config or choose("rope_latent_write", f"P<={block_p}", DEFAULT, q.device)
    grid = (num_tokens, 1 + triton.cdiv(num_heads, config.blocks["BLOCK"] // block_p))
    _rope_latent_write_kernel[grid](
        q,
        latent,
        key,
        turns,
        slots,
        cache,
        q.stride(0),
        q.stride(1),
        latent.stride(0),
        key.stride(0),
        NUM_HEADS=num_heads,
        LATENT_DIM=latent.shape[1],
        ROPE_DIM=key.shape[1],
        BLOCK_R=triton.next_power_of_2(latent.shape[1]),
        BLOCK_P=block_p,
        **config.arguments(),
    )


def _check(
    q: torch.Tensor,
    latent: torch.Tensor,
    key: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    if q.ndim != 3 or cache.ndim != 2 or q.shape[2] != cache.shape[1]:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected [T, H, R + P] for a cache {tuple(cache.shape)}")
    num_tokens, _, width = q.shape
    rope_dim = 2 * turns.shape[1] if turns.ndim == 3 else 0
    if not 2 <= rope_dim < width or not turns.is_contiguous():
        raise ValueError(f"turns has shape {tuple(turns.shape)}, expected [T, P / 2, 2] with P < {width}")
    if not cache.is_contiguous():
        raise ValueError(f"cache has strides {cache.stride()}, expected ({width}, 1)")
    check_tensor("q", q, tuple(q.shape))
    check_tensor("cache", cache, tuple(cache.shape), q.dtype)
    check_tensor("latent", latent, (num_tokens, width - rope_dim), q.dtype)
    check_tensor("key", key, (num_tokens, rope_dim), q.dtype)
    check_tensor("turns", turns, (num_tokens, rope_dim // 2, 2), torch.float32)
    check_tensor("slots", slots, (num_tokens,), torch.int64)
