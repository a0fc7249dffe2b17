"""Linear layers for few tokens: as fast as the weight can be read.

    y = x W^T + bias + residual,   x [T, in], W [out, in], T <= 64

Sums in float32, rounded once. With T this small nothing counts but that all of the device reads the weight, once, with
many bytes on their way: tiles are small, or K is split (`matmul_tile`), and a program loads steps ahead into shared
memory, whence the matrix unit takes both operands. A tile of tokens has at least 16 columns, mostly of zeros for one
token: products cost nothing here.
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
    enough_programs,
    finish_tile,
    locate_tile,
    make_output,
    narrow_rows,
    plan_launch,
)
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor, num_multiprocessors

# With so few, tiles of 16 rows read less of x than of the weight.
NARROW_TOKENS: Final = 4


def matmul_skinny_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`matmul_skinny` in plain torch."""
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return (y if residual is None else y + residual.float()).to(x.dtype)


@triton.jit
def dense_product(
    x_ptrs,
    x_mask,
    weight_ptrs,
    K,
    k_begin,
    k_end,
    IS_EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W x^T of some columns: [BLOCK_N, BLOCK_T] float32.

    Args:
        x_ptrs: [BLOCK_T], to the first column.
        weight_ptrs: [BLOCK_N], to the first column; all may be read.
    """
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        if IS_EVEN:
            weights = tl.load(weight_ptrs[:, None] + (k + columns)[None, :])
            x = tl.load(x_ptrs[:, None] + (k + columns)[None, :], mask=x_mask[:, None], other=0.0)
        else:
            inside = (k + columns < K)[None, :]
            weights = tl.load(weight_ptrs[:, None] + (k + columns)[None, :], mask=inside, other=0.0)
            x = tl.load(x_ptrs[:, None] + (k + columns)[None, :], mask=x_mask[:, None] & inside, other=0.0)
        if weights.dtype == tl.float8e4nv:
            # The matrix unit's own sums have but about 14 bits (`matmul_fp8`).
            total += tl.dot(weights, tl.trans(x))
        else:
            total = tl.dot(weights, tl.trans(x), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def _matmul_skinny_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    weight_stride,
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
    IS_EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile, or of one tile the products of some columns."""
    token_tile, row_tile = locate_tile(T, OUT, BLOCK_T, BLOCK_N)
    tokens = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.minimum(row_tile * BLOCK_N + tl.arange(0, BLOCK_N), OUT - 1)
    k_begin = tl.program_id(1) * split_size
    total = dense_product(
        x_ptr + tokens.to(tl.int64) * x_stride,
        tokens < T,
        weight_ptr + rows.to(tl.int64) * weight_stride,
        K,
        k_begin,
        tl.minimum(k_begin + split_size, K),
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


def matmul_skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x W^T, with what is added.

    Args:
        x: [T, in] of bfloat16, float16 or float32, T <= 64; rows may be strided.
        weight: [out, in] of x's type; rows may be strided.
        counters: of `make_counters`, this weight's.
        bias: [out].
        residual: [T, out]; rows may be strided. It may be `out`.
        config: None for the one that `tuning` has.

    Returns:
        [T, out] of x's type.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    out_features, in_features = weight.shape
    num_tokens = check_input(x, in_features)
    if num_tokens > FEW_TOKENS:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at most {FEW_TOKENS} tokens")
    check_tensor("weight", weight, (out_features, in_features), x.dtype)
    epilogue = Epilogue(bias, residual)
    epilogue.check(num_tokens, out_features)
    out = make_output(out, (num_tokens, out_features), x.dtype, x.device)
    if num_tokens == 0:
        return out
    multiprocessors = num_multiprocessors(x.device)
    default = default_config(num_tokens, weight, multiprocessors)
    config = config or choose("matmul_skinny", tuning_key(num_tokens, weight), default, x.device)
    launch = plan_launch(num_tokens, out_features, in_features, config, multiprocessors)
    _matmul_skinny_kernel[launch.grid](
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        out,
        out.stride(0),
        partials_ptr=launch.partials(num_tokens, out_features, x.device),
        counters_ptr=counters,
        T=num_tokens,
        OUT=out_features,
        K=in_features,
        split_size=launch.split_size,
        IS_EVEN=in_features % config.blocks["BLOCK_K"] == 0,
        **(config.arguments() | epilogue.arguments() | {"SPLITS": launch.splits}),
    )
    return out


def tuning_key(num_tokens: int, weight: torch.Tensor) -> str:
    """What the best blocks depend on."""
    most = NARROW_TOKENS if num_tokens <= NARROW_TOKENS else block_tokens(num_tokens, FEW_TOKENS)
    return f"{weight.shape[0]}x{weight.shape[1]}, T <= {most}, {weight.dtype}"


def default_config(num_tokens: int, weight: torch.Tensor, multiprocessors: int) -> Config:
    """16 to 64 rows of the weight a program, so that there are two or more programs a multiprocessor without splits.

    Each program reads all of x, so with more tokens it is better to have wide tiles and split K. Stages make 64 KB of
    shared memory in 16 bits, of which three programs' fit on a multiprocessor.
    """
    out_features, itemsize = weight.shape[0], weight.element_size()
    block_t = block_tokens(num_tokens, FEW_TOKENS)
    block_n = narrow_rows(out_features, multiprocessors) if num_tokens <= NARROW_TOKENS else 64
    block_k = {16: 256, 32: 128, 64: 128 if block_t == 16 else 64}[block_n] * 2 // itemsize
    blocks = {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k}
    if block_n < 64 and out_features >= block_n * enough_programs(multiprocessors):
        blocks["SPLITS"] = 1
    return Config(blocks, num_warps=4, num_stages=65536 // ((block_n + block_t) * block_k * itemsize))
