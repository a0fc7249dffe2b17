"""Linear layers, norms and experts of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

from worker_svc.backends.backend import Activation, Linear
from worker_svc.backends.composed import Reordering
from worker_svc.kernels.grouped_matmul import block_rows, grouped_matmul, sum_pairs
from worker_svc.kernels.matmul_fp8 import ALIGNMENT, matmul_fp8, prepare_fp8, quantize_fp8
from worker_svc.kernels.matmul_skinny import matmul_skinny
from worker_svc.kernels.matmul_tile import make_counters
from worker_svc.kernels.matmul_weight_only import matmul_weight_only
from worker_svc.kernels.moe_routing import align
from worker_svc.kernels.packed_weight import pack_weight
from worker_svc.kernels.rms_norm import rms_norm
from worker_svc.kernels.swiglu import swiglu
from worker_svc.quantization import Fp8Weight, Int4Weight, Int8Weight, Reordered, Weight, dequantize

# Up to so many rows a product is bound by reading the weight, and our kernel reads it in more programs at once.
SKINNY_ROWS: Final = 16


def make_linear(weight: Weight, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype) -> Linear:
    """`weight`: [out, in], in float on the device or quantized anywhere; `bias`: [out] on the device."""
    match weight:
        case Reordered(inner, order):
            return Reordering(make_linear(inner, bias, device, dtype), order.to(device))
        case Int4Weight() | Int8Weight():
            return WeightOnlyLinear(weight, bias, device)
        case Fp8Weight() if weight.values.shape[1] % ALIGNMENT == 0:
            return Fp8Linear(weight, bias, device, dtype)
        case Fp8Weight():
            return DenseLinear(dequantize(weight).to(device, dtype), bias)
        case _:
            return DenseLinear(weight, bias)


class DenseLinear:
    """A float weight: our kernel for few rows, the library's product for more."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._counters = None if weight.is_meta else make_counters(len(weight), weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._counters is not None and len(x) <= SKINNY_ROWS:
            return matmul_skinny(x, self._weight, self._counters, self._bias)
        return F.linear(x, self._weight, self._bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self._counters is not None and len(x) <= SKINNY_ROWS:
            return matmul_skinny(x, self._weight, self._counters, self._bias, residual, out=residual)
        summed = residual.addmm_(x, self._weight.t())
        return summed if self._bias is None else summed.add_(self._bias)


class WeightOnlyLinear:
    """A weight of 4 or 8 bits, made float as it is multiplied."""

    def __init__(self, weight: Int4Weight | Int8Weight, bias: torch.Tensor | None, device: torch.device) -> None:
        tensors = [getattr(weight, name).to(device) for name in weight.__slots__]
        self._weight = pack_weight(type(weight)(*tensors))
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul_weight_only(x, self._weight, self._bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return matmul_weight_only(x, self._weight, self._bias, residual, out=residual)


class Fp8Linear:
    """A float8 weight times x in float8, quantized row by row."""

    def __init__(self, weight: Fp8Weight, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        self._weight = prepare_fp8(Fp8Weight(weight.values.to(device), weight.scales.to(device)))
        self._bias = bias
        self._dtype = dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return matmul_fp8(quantize_fp8(x), self._weight, self._dtype, self._bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return matmul_fp8(quantize_fp8(x), self._weight, self._dtype, self._bias, residual, out=residual)


class GroupedExperts:
    """All experts' float weights in one tensor, and one launch for what all tokens ask of them."""

    def __init__(self, weights: Sequence[tuple[torch.Tensor, torch.Tensor]], activation: Activation) -> None:
        """`weights`: gate and up side by side, and down, of each expert."""
        self._gate_up = torch.stack([gate_up for gate_up, _ in weights])
        self._down = torch.stack([down for _, down in weights])
        self._activation = activation

    def add(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        num_experts = len(self._gate_up)
        alignment = align(
            expert_ids.to(torch.int32).contiguous(), num_experts, block_rows(expert_ids.numel(), num_experts)
        )
        inner = swiglu(grouped_matmul(x, self._gate_up, alignment), self._activation)
        outer = grouped_matmul(inner, self._down, alignment, weights.float().contiguous())
        return sum_pairs(outer, expert_ids.shape[1], residual)


class TritonNorm:
    """Root mean square norm of whole rows."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._weight, self._eps)
