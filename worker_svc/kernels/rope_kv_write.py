"""What stands between the QKV matmul and attention, in one kernel: norms of heads, rotary positions, the KV write.

For each token t with slot s >= 0 and each of its heads x [D], of q [H], k [KH] and v [KH]:

    q, k:  x = weight * x / sqrt(mean(x^2) + eps)     if there are norms (Qwen3), rounded as `rms_norm` does
           (x_2i, x_2i+1) = turns[t, i] * (x_2i, x_2i+1)   as complex numbers, for 2i < P <= D (Su et al. 2021)
    q:     in place
    k, v:  kv[head, s] = x, or round(x / scale) with kv_scales[head, s] = scale = max|x| / (127 or 448)

`kv` is [2 * KH, N * S, D], the heads of K before those of V; pairs are interleaved as `worker_svc.rope` has them.
Computed in float32 and rounded once, when it is stored; int8 and float8 are made of the float32 values.

The turns of a step are made once for all layers, by torch, and not in here: the angle at position 131072 needs a
reduction of its argument in more than float32, for which a kernel would keep a slow path with memory of its own in
every layer. The angle is the float32 product of position and frequency, as `transformers` has it: off by up to 0.004
at that position, but models and their float32 outputs are made with just this value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from worker_svc.kernels.rms_norm import rms_norm_reference
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor

# The largest value of each type that K and V can be quantized to.
LARGEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Added to and taken from a small float32, this rounds it to an integer, halves to even.
ROUND: Final = tl.constexpr(1.5 * 2**23)
# Of a head of zeros.
LEAST_SCALE: Final = tl.constexpr(1e-30)
# 1024 channels for 128 threads: 16-byte loads, and 6 programs for a token of Llama-3-8B.
DEFAULT: Final = Config({"BLOCK": 1024}, num_warps=4)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of single heads of q and k; both weights [D], in the order of the heads' channels."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


def rope_kv_write_reference(
    qkv: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """`rope_kv_write` in plain torch."""
    num_kv_heads, head_dim = len(kv) // 2, kv.shape[2]
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q = rms_norm_reference(q, norms.q_weight, norms.eps)
        k = rms_norm_reference(k, norms.k_weight, norms.eps)
    is_real = slots >= 0
    rotated = _rotate_reference(q, turns)[is_real].to(qkv.dtype)
    heads[is_real, : q.shape[1]] = rotated
    new = torch.cat([_rotate_reference(k, turns), v.float()], dim=1)[is_real].transpose(0, 1)
    if kv_scales is not None:
        scales = (new.abs().amax(dim=-1) / LARGEST[kv.dtype]).clamp(min=LEAST_SCALE.value)
        kv_scales[:, slots[is_real]] = scales
        new = new * (1.0 / scales)[:, :, None]
    kv[:, slots[is_real]] = (new.round() if kv.dtype == torch.int8 else new).to(kv.dtype)
    return heads[:, : q.shape[1]]


def _rotate_reference(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """`x`: [T, heads, D]; returns float32."""
    x, size = x.float(), 2 * turns.shape[1]
    pairs = torch.view_as_complex(x[..., :size].unflatten(-1, (-1, 2)).contiguous())
    rotated = torch.view_as_real(pairs * torch.view_as_complex(turns.contiguous())[:, None]).flatten(-2)
    return torch.cat([rotated, x[..., size:]], dim=-1)


@triton.jit
def _quantize(x, LARGEST: tl.constexpr):
    """`x`: [heads, D] float32. Returns x / scale, whole numbers if LARGEST is that of int8, and scale [heads]."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, LEAST_SCALE)
    scaled = x * (1.0 / scale)[:, None]
    if LARGEST == 127.0:
        scaled = (scaled + ROUND) - ROUND
    return scaled, scale


@triton.jit
def _rope_kv_write_kernel(
    qkv_ptr,
    turns_ptr,
    slots_ptr,
    kv_ptr,
    kv_scales_ptr,  # None if not quantized
    q_weight_ptr,  # None for no norms
    k_weight_ptr,
    qkv_stride,
    kv_head_stride,
    scales_head_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of one token: BLOCK // BLOCK_D of them, with BLOCK_D >= D."""
    BLOCK_HEADS: tl.constexpr = BLOCK // BLOCK_D
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    # The token's slot for each of its heads. Only stores ask for it, so that it and the heads are waited for at once.
    slots = tl.load(slots_ptr + token + tl.zeros_like(heads))
    channels = tl.arange(0, BLOCK_D)
    mask = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (channels < HEAD_DIM)[None, :]
    qkv_ptrs = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_DIM + channels[None, :]
    loaded = tl.load(qkv_ptrs, mask=mask, other=0.0)
    x = loaded.to(tl.float32)
    is_q = (heads < NUM_HEADS)[:, None]
    is_rotated = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    # What all heads share is loaded for each: one row would go through shared memory to reach the others.
    same = tl.zeros_like(heads)[:, None] + channels[None, :]
    if q_weight_ptr is not None:
        q_weight = tl.load(q_weight_ptr + same, mask=mask & is_q, other=0.0)
        k_weight = tl.load(k_weight_ptr + same, mask=mask & ~is_q, other=0.0)
        weight = tl.where(is_q, q_weight, k_weight)
        normed = x * tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        normed = (normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(loaded.dtype)
        x = tl.where(is_rotated, normed.to(tl.float32), x)

    is_turned = same < 2 * NUM_PAIRS
    turns = tl.load(turns_ptr + token * (2 * NUM_PAIRS) + same, mask=is_turned, other=0.0)
    # A pair that stays turns by 1 + 0i.
    turns = tl.where(is_turned | (same % 2 == 1), turns, 1.0)
    cosine, sine = tl.split(tl.reshape(turns, (BLOCK_HEADS, BLOCK_D // 2, 2)))
    real, imaginary = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_D // 2, 2)))
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    x = tl.where(is_rotated, tl.reshape(turned, (BLOCK_HEADS, BLOCK_D)), x)

    mask = mask & (slots >= 0)[:, None]
    tl.store(qkv_ptrs, x.to(loaded.dtype), mask=mask & is_q)
    # The heads of K, then those of V, in `qkv` as in the cache.
    kv_heads = (heads - NUM_HEADS).to(tl.int64)
    if kv_scales_ptr is not None:
        x, scale = _quantize(x, LARGEST)
        is_kv = (heads >= NUM_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (slots >= 0)
        tl.store(kv_scales_ptr + kv_heads * scales_head_stride + slots, scale, mask=is_kv)
    kv_ptrs = kv_ptr + kv_heads[:, None] * kv_head_stride + slots[:, None] * HEAD_DIM + channels[None, :]
    tl.store(kv_ptrs, x.to(kv_ptr.dtype.element_ty), mask=mask & ~is_q)


def rope_kv_write(
    qkv: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Norm and rotate q and k, and put K and V into the cache.

    Args:
        qkv: [T, (H + 2 * KH) * D]; rows may be strided. q is overwritten.
        turns: [T, P / 2, 2] float32, contiguous: cosine and sine of each pair's angle, that of the token's position.
        slots: [T] int64; below 0 for rows that pad a CUDA graph, of which nothing is written.
        kv: [2 * KH, N * S, D] of qkv's type, or int8 or float8_e4m3fn; one layer's cache, heads may be strided.
        kv_scales: [2 * KH, N * S] float32 if `kv` is of one of these, else None.
        config: None for the one that `tuning` has.

    Returns:
        q, a view of `qkv`: [T, H, D].

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    num_heads = _check(qkv, turns, slots, kv, kv_scales, norms)
    num_tokens, (kv_heads, _, head_dim) = len(qkv), kv.shape
    q = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return q
    block_d = triton.next_power_of_2(head_dim)
    config = config or choose("rope_kv_write", f"D<={block_d}", DEFAULT, qkv.device)
    grid = (num_tokens, triton.cdiv(num_heads + kv_heads, config.blocks["BLOCK"] // block_d))
    _rope_kv_write_kernel[grid](
        qkv,
        turns,
        slots,
        kv,
        kv_scales,
        None if norms is None else norms.q_weight,
        None if norms is None else norms.k_weight,
        qkv.stride(0),
        kv.stride(0),
        0 if kv_scales is None else kv_scales.stride(0),
        0.0 if norms is None else norms.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=kv_heads // 2,
        HEAD_DIM=head_dim,
        NUM_PAIRS=turns.shape[1],
        LARGEST=LARGEST.get(kv.dtype),
        BLOCK_D=block_d,
        **config.arguments(),
    )
    return q


def _check(
    qkv: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    kv_scales: torch.Tensor | None,
    norms: HeadNorms | None,
) -> int:
    """Returns: H."""
    if kv.ndim != 3 or len(kv) % 2 or kv.stride()[1:] != (kv.shape[2], 1):
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}, strides {kv.stride()}, expected [2 * KH, N * S, D] with D, 1"
        )
    kv_heads, num_slots, head_dim = kv.shape
    if kv.dtype != qkv.dtype and kv.dtype not in LARGEST:
        raise ValueError(f"kv is {kv.dtype}, expected {qkv.dtype}, torch.int8 or torch.float8_e4m3fn")
    if (kv_scales is not None) != (kv.dtype in LARGEST):
        raise ValueError(f"kv_scales is {'missing' if kv_scales is None else 'given'}, and kv is {kv.dtype}")
    if kv_scales is not None:
        check_tensor("kv_scales", kv_scales, (kv_heads, num_slots), torch.float32)
    num_heads = qkv.shape[-1] // head_dim - kv_heads
    if num_heads < 1:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected [T, (H + {kv_heads}) * {head_dim}]")
    check_tensor("qkv", qkv, (len(qkv), (num_heads + kv_heads) * head_dim))
    if turns.ndim != 3 or not 2 <= 2 * turns.shape[1] <= head_dim or not turns.is_contiguous():
        raise ValueError(f"turns has shape {tuple(turns.shape)}, expected [T, P / 2, 2] with P <= {head_dim}")
    check_tensor("turns", turns, (len(qkv), turns.shape[1], 2), torch.float32)
    check_tensor("slots", slots, (len(qkv),), torch.int64)
    for name, weight in () if norms is None else (("q_weight", norms.q_weight), ("k_weight", norms.k_weight)):
        check_tensor(name, weight, (head_dim,))
    return num_heads
