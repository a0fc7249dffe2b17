"""The gate of an MLP (Shazeer 2020): activation(gate) * up.

    gate_up [T, 2 * I], gate first -> [T, I]
    silu(x)      = x * sigmoid(x)
    gelu_tanh(x) = x / 2 * (1 + tanh(z / 2)) = x * sigmoid(z),  z = sqrt(8 / pi) * (x + 0.044715 x^3)

Computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from worker_svc.backends.backend import Activation
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor

GELU_FACTOR: Final = tl.constexpr(math.sqrt(8 / math.pi))
GELU_CUBIC: Final = tl.constexpr(0.044715)
# 8 elements a thread, one 16-byte load of bfloat16. 14336 columns are 7 blocks, so one row still is 7 programs.
DEFAULT: Final = Config({"BLOCK": 2048}, num_warps=8)


def swiglu_reference(gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """`swiglu` in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (activated * up).to(gate_up.dtype)


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride, SIZE: tl.constexpr, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of one row. The output is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    z = gate
    if not IS_SILU:
        z = GELU_FACTOR * (gate + GELU_CUBIC * gate * gate * gate)
    out = gate * tl.sigmoid(z) * up
    tl.store(out_ptr + row * SIZE + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up: torch.Tensor, activation: Activation = "silu", config: Config | None = None) -> torch.Tensor:
    """Gate each row.

    Args:
        gate_up: [T, 2 * I]; rows may be strided.
        config: None for the one that `tuning` has.

    Returns:
        [T, I] of the same type, contiguous.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected [T, 2 * I]")
    check_tensor("gate_up", gate_up, tuple(gate_up.shape))
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    config = config or choose("swiglu", "", DEFAULT, gate_up.device)
    grid = (num_tokens, triton.cdiv(size, config.blocks["BLOCK"]))
    _swiglu_kernel[grid](gate_up, out, gate_up.stride(0), SIZE=size, IS_SILU=activation == "silu", **config.arguments())
    return out
