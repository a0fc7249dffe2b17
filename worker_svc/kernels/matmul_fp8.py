"""Linear layers with weights and activations in float8_e4m3fn.

    y[t, n] = x_scales[t] * weight_scales[n] * sum_k x[t, k] W[n, k] + bias[n] + residual[t, n]
    x_scales[t] = max_k |x[t, k]| / 448

Products are summed by the matrix unit. Hopper's keeps about 14 bits of a float8 sum (DeepSeek-AI 2024, "DeepSeek-V3
Technical Report", section 3.5.2), which for many tokens is what there is, as in other engines; for few tokens, where
the time is that of reading the weight, sums over 128 columns are added up in float32.

Tiles are fetched by the copy engine (TMA): the descriptors are arguments of the launch, so they hold in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from worker_svc.kernels.matmul_tile import (
    FEW_TOKENS,
    Epilogue,
    block_tokens,
    check_input,
    finish_tile,
    locate_tile,
    make_counters,
    make_output,
    plan_launch,
)
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor, num_multiprocessors
from worker_svc.quantization import FP8, FP8_MAX, Fp8Weight, dequantize

MOST_TOKENS: Final = 256  # of a tile
ALIGNMENT: Final = 16  # of rows, in bytes, for the copy engine
SMALLEST: Final = tl.constexpr(1e-12)
LARGEST: Final = tl.constexpr(FP8_MAX)


@dataclass(frozen=True, slots=True)
class PreparedFp8:
    """A weight as the kernel wants it."""

    values: torch.Tensor  # [out, in] float8_e4m3fn, contiguous
    scales: torch.Tensor  # [out] float32
    counters: torch.Tensor


def prepare_fp8(weight: Fp8Weight) -> PreparedFp8:
    """One scale a row, or one in all.

    Raises:
        ValueError: the copy engine cannot read rows of this size.
    """
    out_features, in_features = weight.values.shape
    if in_features % ALIGNMENT:
        raise ValueError(f"the weight has {in_features} columns, expected a multiple of {ALIGNMENT}")
    scales = weight.scales.float().reshape(-1).expand(out_features).contiguous()
    return PreparedFp8(weight.values.contiguous(), scales, make_counters(out_features, scales.device))


def quantize_fp8_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` in plain torch."""
    scales = x.float().abs().amax(dim=1).clamp_min(SMALLEST.value) / FP8_MAX
    return (x.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


def matmul_fp8_reference(
    x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`matmul_fp8` of quantized x in plain torch, rounded once."""
    values, scales = quantize_fp8_reference(x)
    y = F.linear(values.float() * scales[:, None], dequantize(weight), None if bias is None else bias.float())
    return (y if residual is None else y + residual.float()).to(x.dtype)


@triton.jit
def _quantize_fp8_kernel(x_ptr, x_stride, values_ptr, scales_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST) / LARGEST
    # The quotient of the largest may come out a little over.
    values = tl.clamp(x / scale, -LARGEST, LARGEST)
    tl.store(values_ptr + row * SIZE + columns, values.to(values_ptr.dtype.element_ty), mask=columns < SIZE)
    tl.store(scales_ptr + row, scale)


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of each row.

    Args:
        x: [T, in] of bfloat16, float16 or float32; rows may be strided.

    Returns:
        [T, in] float8_e4m3fn and [T] float32.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    num_tokens = check_input(x, x.shape[-1])
    size = x.shape[1]
    values = torch.empty((num_tokens, size), dtype=FP8, device=x.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(size)
        # 16 elements a thread, and at most 1024 threads.
        num_warps = min(max(block // 512, 1), 32)
        _quantize_fp8_kernel[(num_tokens,)](x, x.stride(0), values, scales, SIZE=size, BLOCK=block, num_warps=num_warps)
    return values, scales


@triton.jit(do_not_specialize=["T"])
def _matmul_fp8_kernel(
    x,
    weight,
    x_scales_ptr,
    weight_scales_ptr,
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
    ADDS_WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile, or of one tile the products of some columns. `x` and `weight` are descriptors; outside them is zero."""
    token_tile, row_tile = locate_tile(T, OUT, BLOCK_T, BLOCK_N)
    k_begin = tl.program_id(1) * split_size
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for k in range(k_begin, tl.minimum(k_begin + split_size, K), BLOCK_K):
        weight_tile = weight.load([row_tile * BLOCK_N, k])
        x_tile = x.load([token_tile * BLOCK_T, k])
        if ADDS_WIDE:
            total += tl.dot(weight_tile, tl.trans(x_tile))
        else:
            total = tl.dot(weight_tile, tl.trans(x_tile), total)
    tokens = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total *= tl.load(weight_scales_ptr + rows, mask=rows < OUT, other=0.0)[:, None]
    total *= tl.load(x_scales_ptr + tokens, mask=tokens < T, other=0.0)[None, :]
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


def matmul_fp8(
    x: tuple[torch.Tensor, torch.Tensor],
    weight: PreparedFp8,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x W^T, with what is added.

    Args:
        x: of `quantize_fp8`: [T, in] float8_e4m3fn, contiguous, and [T] float32.
        dtype: of the result.
        bias: [out].
        residual: [T, out]; rows may be strided. It may be `out`.
        config: None for the one that `tuning` has.

    Returns:
        [T, out] of `dtype`.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    values, scales = x
    out_features, in_features = weight.values.shape
    num_tokens = len(scales)
    check_tensor("x", values, (num_tokens, in_features), FP8)
    epilogue = Epilogue(bias, residual)
    epilogue.check(num_tokens, out_features)
    out = make_output(out, (num_tokens, out_features), dtype, values.device)
    if num_tokens == 0:
        return out
    default = default_config(num_tokens)
    config = config or choose("matmul_fp8", tuning_key(num_tokens, weight), default, values.device)
    launch = plan_launch(num_tokens, out_features, in_features, config, num_multiprocessors(values.device))
    blocks = config.blocks
    _matmul_fp8_kernel[launch.grid](
        TensorDescriptor.from_tensor(values, [blocks["BLOCK_T"], blocks["BLOCK_K"]]),
        TensorDescriptor.from_tensor(weight.values, [blocks["BLOCK_N"], blocks["BLOCK_K"]]),
        scales,
        weight.scales,
        out,
        out.stride(0),
        partials_ptr=launch.partials(num_tokens, out_features, values.device),
        counters_ptr=weight.counters,
        T=num_tokens,
        OUT=out_features,
        K=in_features,
        split_size=launch.split_size,
        ADDS_WIDE=num_tokens <= FEW_TOKENS,
        **(config.arguments() | epilogue.arguments() | {"SPLITS": launch.splits}),
    )
    return out


def tuning_key(num_tokens: int, weight: PreparedFp8) -> str:
    """What the best blocks depend on."""
    return f"{weight.values.shape[0]}x{weight.values.shape[1]}, T <= {block_tokens(num_tokens, MOST_TOKENS)}"


def default_config(num_tokens: int) -> Config:
    """128 columns are the widest that the copy engine swizzles. Many tokens: 192 KB of shared memory, one program."""
    if num_tokens <= FEW_TOKENS:
        blocks = {"BLOCK_T": block_tokens(num_tokens, FEW_TOKENS), "BLOCK_N": 64, "BLOCK_K": 128}
        return Config(blocks, num_warps=4, num_stages=6 if num_tokens <= 16 else 4)
    blocks = {"BLOCK_T": block_tokens(num_tokens, MOST_TOKENS), "BLOCK_N": 128, "BLOCK_K": 128}
    return Config(blocks, num_warps=8, num_stages=4)
