"""Root mean square norm (Zhang and Sennrich 2019), alone or with the residual sum that comes before it.

    rms_norm:      y = weight * x / sqrt(mean(x^2) + eps)            x, y [T, E]; weight [E]
    add_rms_norm:  r = residual + x, y = rms_norm(r)                 x, residual, r, y [T, E]

Statistics are float32. As in `transformers`, r is rounded to its type before it is normed, and what is normed is
rounded to the weight's type before it meets the weight: a weight of the model's type gives Llama's norm, a float32
weight that had 1 added at load gives Gemma's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain torch."""
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,  # None for no sum
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. Outputs are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * SIZE + columns, x, mask=mask)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    y = normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, y.to(x.dtype), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, config: Config | None = None) -> torch.Tensor:
    """Norm each row.

    Args:
        x: [T, E]; rows may be strided.
        weight: [E], of x's type or float32.
        config: None for the one that `tuning` has.

    Returns:
        [T, E] of x's type, contiguous.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    _check(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None, config)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, then norm each row of the sum.

    Args:
        x: [T, E]; rows may be strided.
        residual: [T, E] of x's type; rows may be strided.
        weight: [E], of x's type or float32.
        config: None for the one that `tuning` has.

    Returns:
        The normed sum and the sum, both [T, E] of x's type, contiguous.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    _check(x, weight)
    check_tensor("residual", residual, tuple(x.shape), x.dtype)
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, eps, out, total, config)
    return out, total


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [T, E]")
    check_tensor("x", x, tuple(x.shape))
    check_tensor("weight", weight, (x.shape[1],))
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight is {weight.dtype}, expected {x.dtype} or torch.float32")


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
    config: Config | None,
) -> None:
    num_tokens, size = x.shape
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(size)
    config = config or choose("rms_norm", f"E<={block}", default_config(block), x.device)
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        SIZE=size,
        **config.arguments(),
    )


def default_config(block: int) -> Config:
    """A program holds a whole row, 8 elements a thread: one 16-byte load of bfloat16."""
    return Config({"BLOCK": block}, num_warps=min(max(block // 256, 1), 16))
