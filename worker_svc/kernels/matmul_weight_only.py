"""Linear layers with weights of 4 or 8 bits and activations as they are.

    y = x W^T + bias + residual,   W[n, k] = (values[n, k] - zeros[n, g]) * scales[n, g],   g = k // group_size

Weights become 16-bit floats in registers (`packed_weight`), exactly, and are multiplied on the matrix unit with sums in
float32. Where a scale goes depends on what it costs:

    "rows"     one group: scales multiply the total
    "sums"     few tokens: each group's sum is multiplied, in float32
    "weights"  many tokens: weights are multiplied before the product, and rounded to 16 bits once more

With few tokens the time is that of reading the weight, if the instructions keep up: a thread takes 3.5 for each weight
of 4 bits with all that a step costs, and 2.9 in tiles of 128 rows (Triton 3.6 for sm_90). In the time in which an
H200's memory delivers a weight, at 4.3 TB/s and 1.98 GHz, its schedulers issue 4.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from worker_svc.kernels.matmul_tile import (
    FEW_TOKENS,
    Epilogue,
    block_tokens,
    check_input,
    finish_tile,
    locate_tile,
    make_output,
    plan_launch,
)
from worker_svc.kernels.packed_weight import (
    COLUMNS,
    MAGIC,
    PackedWeight,
    load_words,
    offset_zeros,
    scale_ptrs,
    scales_of,
    unpack_words,
    word_ptrs,
)
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import num_multiprocessors
from worker_svc.quantization import Int4Weight, Int8Weight, dequantize

MOST_TOKENS: Final = 256  # of a tile


def matmul_weight_only_reference(
    x: torch.Tensor,
    weight: Int4Weight | Int8Weight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`matmul_weight_only` of the canonical form in plain torch, rounded once."""
    y = F.linear(x.float(), dequantize(weight), None if bias is None else bias.float())
    return (y if residual is None else y + residual.float()).to(x.dtype)


@triton.jit
def packed_product(
    x_ptrs,
    x_mask,
    words_ptr,
    scales_ptr,
    scales_stride,
    row_tile,
    last_row_tile,
    column_tiles,
    K,
    k_begin,
    k_end,
    magic,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALING: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W x^T of some columns: [BLOCK_N, BLOCK_T] float32.

    Args:
        x_ptrs: [BLOCK_T], to the first column.
        row_tile: of 64 rows, the first.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    narrow: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.bfloat16
    STEP: tl.constexpr = min(BLOCK_K, 64)  # columns of one product
    ptrs = word_ptrs(words_ptr, row_tile, last_row_tile, column_tiles, BITS, BLOCK_N, STEP)
    row_ptrs, low_ptrs = scale_ptrs(scales_ptr, row_tile, last_row_tile, BLOCK_N)
    columns = tl.arange(0, STEP)
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)

    offset = k_begin // GROUP_SIZE * scales_stride
    row_scales = tl.load(row_ptrs + offset)
    low_scales = tl.load(low_ptrs + offset)
    high_scales = tl.load(low_ptrs + offset + 8)
    for k in range(k_begin, k_end, BLOCK_K):
        scales = scales_of(row_scales, BITS)[:, None]
        low = offset_zeros(low_scales, magic, narrow)[:, None]
        high = offset_zeros(high_scales, magic, narrow)[:, None]
        if SCALING != "rows":
            # A step ahead, which the compiler arranges for operands of products alone.
            offset = tl.minimum(k + BLOCK_K, k_end - 1) // GROUP_SIZE * scales_stride
            row_scales = tl.load(row_ptrs + offset)
            low_scales = tl.load(low_ptrs + offset)
            high_scales = tl.load(low_ptrs + offset + 8)

        part = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for step in tl.static_range(BLOCK_K // STEP):
            first = k + step * STEP
            weights = unpack_words(load_words(ptrs, first, BITS, STEP), low, high, magic, BITS, STEP, dtype)
            mask = x_mask[:, None]
            if not IS_EVEN:
                mask &= (first + columns < K)[None, :]
            x = tl.trans(tl.load(x_ptrs[:, None] + (first + columns)[None, :], mask=mask, other=0.0))
            if SCALING == "sums":
                part = tl.dot(weights, x, part, input_precision="ieee")
            elif SCALING == "weights":
                weights = (weights.to(tl.float32) * scales.to(dtype).to(tl.float32)).to(dtype)
                total = tl.dot(weights, x, total, input_precision="ieee")
            else:
                total = tl.dot(weights, x, total, input_precision="ieee")
        if SCALING == "sums":
            total += part * scales
    if SCALING == "rows":
        total *= scales_of(row_scales, BITS)[:, None]
    return total


@triton.jit(do_not_specialize=["T"])
def _matmul_weight_only_kernel(
    x_ptr,
    x_stride,
    words_ptr,
    scales_ptr,
    scales_stride,
    column_tiles,
    y_ptr,
    y_stride,
    bias_ptr,
    residual_ptr,
    residual_stride,
    partials_ptr,
    counters_ptr,
    T,
    OUT,
    K,
    split_size,
    magic,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALING: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile, or of one tile the products of some columns."""
    token_tile, row_tile = locate_tile(T, OUT, BLOCK_T, BLOCK_N)
    tokens = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    k_begin = tl.program_id(1) * split_size
    total = packed_product(
        x_ptr + tokens.to(tl.int64) * x_stride,
        tokens < T,
        words_ptr,
        scales_ptr,
        scales_stride,
        row_tile * (BLOCK_N // 64),
        tl.cdiv(OUT, 64) - 1,
        column_tiles,
        K,
        k_begin,
        tl.minimum(k_begin + split_size, K),
        magic,
        BITS,
        GROUP_SIZE,
        SCALING,
        IS_EVEN,
        BLOCK_T,
        BLOCK_N,
        BLOCK_K,
    )
    finish_tile(
        total,
        token_tile,
        row_tile,
        y_ptr,
        y_stride,
        bias_ptr,
        residual_ptr,
        residual_stride,
        partials_ptr,
        counters_ptr,
        T,
        OUT,
        BLOCK_T,
        BLOCK_N,
        SPLITS,
    )


def matmul_weight_only(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x W^T, with what is added.

    Args:
        x: [T, in] of bfloat16, float16 or float32; rows may be strided.
        bias: [out].
        residual: [T, out]; rows may be strided. It may be `out`.
        config: None for the one that `tuning` has.

    Returns:
        [T, out] of x's type.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    num_tokens = check_input(x, weight.in_features)
    epilogue = Epilogue(bias, residual)
    epilogue.check(num_tokens, weight.out_features)
    out = make_output(out, (num_tokens, weight.out_features), x.dtype, x.device)
    if num_tokens == 0:
        return out
    multiprocessors = num_multiprocessors(x.device)
    default = default_config(num_tokens, weight, x.dtype, multiprocessors)
    config = config or choose("matmul_weight_only", tuning_key(num_tokens, weight, x.dtype), default, x.device)
    launch = plan_launch(num_tokens, weight.out_features, weight.in_features, config, multiprocessors)
    arguments = config.arguments() | weight.arguments() | epilogue.arguments() | {"SPLITS": launch.splits}
    _matmul_weight_only_kernel[launch.grid](
        x,
        x.stride(0),
        y_ptr=out,
        y_stride=out.stride(0),
        partials_ptr=launch.partials(num_tokens, weight.out_features, x.device),
        T=num_tokens,
        split_size=launch.split_size,
        magic=MAGIC[x.dtype],
        SCALING=weight.scaling(num_tokens),
        IS_EVEN=weight.in_features % config.blocks["BLOCK_K"] == 0,
        **arguments,
    )
    return out


def tuning_key(num_tokens: int, weight: PackedWeight, dtype: torch.dtype) -> str:
    """What the best blocks depend on."""
    shape = f"{weight.out_features}x{weight.in_features} int{weight.bits} groups of {weight.group_size}"
    return f"{shape}, T <= {block_tokens(num_tokens, MOST_TOKENS)}, {dtype}"


def default_config(num_tokens: int, weight: PackedWeight, dtype: torch.dtype, multiprocessors: int) -> Config:
    """Few tokens: small programs, several side by side. Many: one program of 8 warps has a multiprocessor to itself."""
    longest = weight.group_size if weight.num_groups > 1 else COLUMNS
    if dtype == torch.float32:
        blocks = {"BLOCK_T": block_tokens(num_tokens, 32), "BLOCK_N": 64, "BLOCK_K": min(32, longest)}
        return Config(blocks, num_warps=4, num_stages=3)
    if num_tokens <= FEW_TOKENS:
        # Wide enough, 128 rows share what a step costs besides its weights.
        block_n = 128 if weight.out_features >= 128 * multiprocessors and num_tokens <= 16 else 64
        blocks = {"BLOCK_T": block_tokens(num_tokens, 64), "BLOCK_N": block_n, "BLOCK_K": min(128, longest)}
        return Config(blocks, num_warps=4, num_stages=4 if num_tokens <= 16 else 3)
    blocks = {"BLOCK_T": block_tokens(num_tokens, MOST_TOKENS), "BLOCK_N": 128, "BLOCK_K": min(64, longest)}
    return Config(blocks, num_warps=8, num_stages=4)
