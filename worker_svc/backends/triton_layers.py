"""Linear layers and norms of a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from worker_svc.backends.backend import Linear
from worker_svc.kernels.rms_norm import rms_norm
from worker_svc.quantization import Weight, dequantize


def make_linear(weight: Weight, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """`weight`: [out, in], in float on the device or quantized anywhere; `bias`: [out] on the device."""
    if isinstance(weight, torch.Tensor):
        return DenseLinear(weight, bias)
    return DenseLinear(dequantize(weight).to(device), bias)


class DenseLinear:
    """The library's product, with what is added in its epilogue."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        summed = residual.addmm_(x, self._weight.t())
        return summed if self._bias is None else summed.add_(self._bias)


class TritonNorm:
    """Root mean square norm of whole rows."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._weight, self._eps)
