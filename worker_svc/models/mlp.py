"""The gated MLP (Shazeer 2020): x + W_down (activation(W_gate norm(x)) * W_up norm(x))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from worker_svc.backends.backend import Activation, Backend, Linear
from worker_svc.models.builder import Builder, Output
from worker_svc.models.loader import Part
from worker_svc.models.spec import DenseMlp


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """One layer's, or the experts' that all tokens share."""

    backend: Backend
    activation: Activation
    gate_up: Linear
    down: Output

    def add(self, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Returns: [T, E], `residual` with the MLP of `normed` added."""
        return self.down.add(self.backend.gate(self.gate_up(normed), self.activation), residual)


def build_mlp(spec: DenseMlp, layer: str, name: str, builder: Builder) -> GatedMlp:
    """`layer`, `name`: of the layer and of the MLP in the checkpoint."""
    inner, hidden_size = spec.intermediate_size, builder.spec.hidden_size
    down = Part(f"{name}.down_proj", hidden_size, has_bias=spec.has_bias)
    return GatedMlp(
        backend=builder.backend,
        activation=spec.activation,
        gate_up=builder.reader.linear(_gate_up_parts(spec, name), hidden_size),
        down=builder.output(down, inner, f"{layer}.post_feedforward_layernorm"),
    )


def _gate_up_parts(spec: DenseMlp, name: str) -> Sequence[Part]:
    inner = spec.intermediate_size
    if spec.is_fused:
        fused = Part(f"{name}.gate_up_proj", inner, has_bias=spec.has_bias, num_tensor_rows=2 * inner, is_shared=True)
        return (fused, replace(fused, first_row=inner))
    return [Part(f"{name}.{part}_proj", inner, has_bias=spec.has_bias, is_shared=True) for part in ("gate", "up")]
