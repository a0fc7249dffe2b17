"""Linear layers of which each token uses some: the experts of a mixture (Shazeer et al. 2017).

    y[p] = (W[expert of p] x[row of p]) * weights[p],   p = t * K + j: token t with its j-th expert

in the order of pairs, whatever the order of work: a program has one tile of `moe_routing.align`, rows of one expert
gathered from x, and some rows of that expert's weight. Nothing is added up between programs, so that the result is the
same each time; `sum_pairs` adds up a token's K rows in order. A layer is

    route, align, grouped_matmul (gate and up), swiglu, grouped_matmul (down, with weights), sum_pairs

Weights may be 16- or 32-bit floats, of 4 or 8 bits (`matmul_weight_only`), or float8 with float8 x (`matmul_fp8`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from worker_svc.kernels.matmul_skinny import dense_product
from worker_svc.kernels.matmul_tile import block_tokens, check_input, make_output, narrow_rows
from worker_svc.kernels.matmul_weight_only import packed_product
from worker_svc.kernels.moe_routing import Alignment
from worker_svc.kernels.packed_weight import MAGIC, ROWS, PackedWeight
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor, num_multiprocessors
from worker_svc.quantization import FP8

MOST_ROWS: Final = 128  # of a tile


def grouped_matmul_reference(
    x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`grouped_matmul` in plain torch, rounded once.

    Args:
        x: [T, in] or [T * K, in].
        weight: [X, out, in].
        experts: [T, K].
        weights: [T, K].

    Returns:
        [T * K, out].
    """
    rows = x.float().repeat_interleave(experts.numel() // len(x), dim=0)
    y = torch.zeros((experts.numel(), weight.shape[1]), device=x.device)
    for expert in range(len(weight)):
        found = experts.flatten() == expert
        y[found] = rows[found] @ weight[expert].float().t()
    return (y if weights is None else y * weights.flatten()[:, None]).to(x.dtype)


@triton.jit
def _grouped_matmul_kernel(
    x_ptr,
    x_stride,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    words_ptr,
    scales_ptr,
    scales_stride,
    column_tiles,
    pairs_ptr,
    tile_experts_ptr,
    pair_weights_ptr,
    y_ptr,
    num_tiles,
    P,
    OUT,
    K,
    magic,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALING: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of pairs by some rows of their expert's weight; experts of few pairs side by side."""
    tile = tl.program_id(0) % num_tiles
    row_tile = tl.program_id(0) // num_tiles
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    pairs = tl.load(pairs_ptr + tile * BLOCK_T + tl.arange(0, BLOCK_T))
    mask = pairs < P
    x_rows = pairs // PAIRS_PER_ROW
    x_ptrs = x_ptr + x_rows.to(tl.int64) * x_stride
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if words_ptr is None:
        own_rows = expert * OUT + tl.minimum(rows, OUT - 1)
        total = dense_product(x_ptrs, mask, weight_ptr + own_rows * K, K, 0, K, IS_EVEN, BLOCK_T, BLOCK_N, BLOCK_K)
        if x_scales_ptr is not None:
            total *= tl.load(weight_scales_ptr + own_rows)[:, None]
            total *= tl.load(x_scales_ptr + x_rows, mask=mask, other=0.0)[None, :]
    else:
        first_tile = expert.to(tl.int32) * (OUT // 64)
        total = packed_product(
            x_ptrs,
            mask,
            words_ptr,
            scales_ptr,
            scales_stride,
            first_tile + row_tile * (BLOCK_N // 64),
            first_tile + OUT // 64 - 1,
            column_tiles,
            K,
            0,
            K,
            magic,
            BITS,
            GROUP_SIZE,
            SCALING,
            IS_EVEN,
            BLOCK_T,
            BLOCK_N,
            BLOCK_K,
        )
    if pair_weights_ptr is not None:
        total *= tl.load(pair_weights_ptr + pairs, mask=mask, other=0.0)[None, :]
    places = pairs.to(tl.int64)[:, None] * OUT + rows[None, :]
    mask = mask[:, None] & (rows < OUT)[None, :]
    tl.store(y_ptr + places, tl.trans(total).to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """A weight for each of X experts, for x of `quantize_fp8`."""

    values: torch.Tensor  # [X, out, in] float8_e4m3fn, contiguous
    scales: torch.Tensor  # [X, out] float32


# Packed: [X * out, in], one expert's rows after the other's.
Experts = torch.Tensor | PackedWeight | Fp8Experts


def grouped_matmul(
    x: torch.Tensor,
    weight: Experts,
    alignment: Alignment,
    pair_weights: torch.Tensor | None = None,
    x_scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Each pair's row of x times its expert's weight.

    Args:
        x: [T, in], or [P, in] with a row for each pair; rows may be strided.
        weight: [X, out, in] of x's type, contiguous, or quantized; `out` of a packed one is a multiple of 64.
        pair_weights: [T, K] float32, contiguous; what results are multiplied by.
        x_scales: [rows of x] float32, if x and weight are float8.
        dtype: of the result; None for x's.
        config: None for the one that `tuning` has. Its BLOCK_T is the alignment's.

    Returns:
        [P, out], in the order of pairs.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    num_pairs, num_experts = alignment.num_pairs, alignment.num_experts
    out_features, in_features = _shape(weight, num_experts)
    _check(x, weight, alignment, in_features, pair_weights, x_scales)
    y = make_output(None, (num_pairs, out_features), dtype or x.dtype, x.device)
    if num_pairs == 0:
        return y
    default = default_config(weight, alignment, out_features, x.dtype, num_multiprocessors(x.device))
    config = config or choose("grouped_matmul", tuning_key(weight, alignment), default, x.device)
    grid = (alignment.num_tiles * triton.cdiv(out_features, config.blocks["BLOCK_N"]),)
    _grouped_matmul_kernel[grid](
        x,
        x.stride(0),
        x_scales,
        pairs_ptr=alignment.pairs,
        tile_experts_ptr=alignment.tile_experts,
        pair_weights_ptr=pair_weights,
        y_ptr=y,
        num_tiles=alignment.num_tiles,
        P=num_pairs,
        OUT=out_features,
        K=in_features,
        PAIRS_PER_ROW=num_pairs // len(x),
        IS_EVEN=in_features % config.blocks["BLOCK_K"] == 0,
        **(_weight_arguments(weight, alignment, x) | config.arguments()),
    )
    return y


def block_rows(num_pairs: int, num_experts: int) -> int:
    """BLOCK_T for `align`: half as many again as an expert gets of the pairs, so that most have one tile."""
    return block_tokens(triton.cdiv(3 * num_pairs, 2 * num_experts), MOST_ROWS)


def _shape(weight: Experts, num_experts: int) -> tuple[int, int]:
    """out and in of one expert."""
    if isinstance(weight, PackedWeight):
        out_features = weight.out_features // num_experts
        if weight.out_features % (num_experts * ROWS):
            raise ValueError(f"weight has {weight.out_features} rows, expected multiples of {ROWS} for each expert")
        return out_features, weight.in_features
    values = weight.values if isinstance(weight, Fp8Experts) else weight
    if values.ndim != 3 or len(values) != num_experts or not values.is_contiguous():
        raise ValueError(f"weight has shape {tuple(values.shape)}, expected ({num_experts}, out, in), contiguous")
    return values.shape[1], values.shape[2]


def _check(
    x: torch.Tensor,
    weight: Experts,
    alignment: Alignment,
    in_features: int,
    pair_weights: torch.Tensor | None,
    x_scales: torch.Tensor | None,
) -> None:
    num_pairs = alignment.num_pairs
    if isinstance(weight, Fp8Experts):
        check_tensor("x", x, (len(x), in_features), FP8)
        if x_scales is None:
            raise ValueError(f"x_scales is None, expected shape ({len(x)},)")
        check_tensor("x_scales", x_scales, (len(x),), torch.float32)
    else:
        check_input(x, in_features)
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, expected {x.dtype}")
    if num_pairs and num_pairs % len(x):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a row for each token or each of {num_pairs} pairs")
    if pair_weights is not None and (pair_weights.numel() != num_pairs or not pair_weights.is_contiguous()):
        raise ValueError(
            f"pair_weights has shape {tuple(pair_weights.shape)}, expected {num_pairs} elements, contiguous"
        )


def _weight_arguments(weight: Experts, alignment: Alignment, x: torch.Tensor) -> dict[str, Any]:
    """The weight as arguments of the kernel; those of other kinds are None."""
    names = ("weight_ptr", "weight_scales_ptr", "words_ptr", "scales_ptr", "scales_stride", "column_tiles", "magic")
    nothing: dict[str, Any] = dict.fromkeys((*names, "BITS", "GROUP_SIZE", "SCALING"))
    match weight:
        case PackedWeight():
            own = weight.arguments() | {"magic": MAGIC[x.dtype], "SCALING": weight.scaling(alignment.block_t)}
            return nothing | {name: own[name] for name in nothing if name in own}
        case Fp8Experts(values, scales):
            return nothing | {"weight_ptr": values, "weight_scales_ptr": scales}
        case _:
            return nothing | {"weight_ptr": weight}


def tuning_key(weight: Experts, alignment: Alignment) -> str:
    """What the best blocks depend on."""
    out_features, in_features = _shape(weight, alignment.num_experts)
    kind = {torch.Tensor: "dense", Fp8Experts: "fp8"}.get(type(weight))
    if isinstance(weight, PackedWeight):
        kind = f"int{weight.bits} groups of {weight.group_size}"
    return f"{alignment.num_experts}x{out_features}x{in_features} {kind}, BLOCK_T {alignment.block_t}"


def default_config(
    weight: Experts, alignment: Alignment, out_features: int, dtype: torch.dtype, multiprocessors: int
) -> Config:
    """Few rows an expert: the time is that of reading weights. Many: large tiles, one program a multiprocessor."""
    block_t, block_k, stages = alignment.block_t, 128 // dtype.itemsize, 5
    if isinstance(weight, PackedWeight):
        block_k, stages = min(block_k, weight.group_size) if weight.num_groups > 1 else block_k, 8
    if block_t >= 64:
        return Config({"BLOCK_T": block_t, "BLOCK_N": 128, "BLOCK_K": block_k}, num_warps=8, num_stages=4)
    block_n = 64
    if isinstance(weight, torch.Tensor):
        active = min(alignment.num_pairs, alignment.num_experts)
        block_n = narrow_rows(active * out_features, multiprocessors)
        block_k = block_k if block_n == 64 else 2 * block_k
    return Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps=4, num_stages=stages)


@triton.jit
def _sum_pairs_kernel(
    y_ptr, residual_ptr, residual_stride, out_ptr, SIZE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Some columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + token * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(y_ptr + (token * TOP_K + j) * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_pairs_reference(y: torch.Tensor, top_k: int, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`sum_pairs` in plain torch."""
    total = y.float().view(-1, top_k, y.shape[1]).sum(1)
    return (total if residual is None else total + residual.float()).to(y.dtype)


def sum_pairs(y: torch.Tensor, top_k: int, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Add up each token's rows, in float32, and what is added to them.

    Args:
        y: [T * K, out], contiguous.
        residual: [T, out]; rows may be strided.

    Returns:
        [T, out] of y's type.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    num_pairs, size = y.shape
    if num_pairs % top_k or not y.is_contiguous():
        raise ValueError(f"y has shape {tuple(y.shape)}, expected [T * {top_k}, out], contiguous")
    num_tokens = num_pairs // top_k
    if residual is not None:
        check_tensor("residual", residual, (num_tokens, size))
    out = torch.empty((num_tokens, size), dtype=y.dtype, device=y.device)
    if num_tokens:
        stride = 0 if residual is None else residual.stride(0)
        _sum_pairs_kernel[(num_tokens, triton.cdiv(size, 1024))](
            y, residual, stride, out, SIZE=size, TOP_K=top_k, BLOCK=1024
        )
    return out
