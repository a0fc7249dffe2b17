"""The gated MLP (Shazeer 2020): x + W_down (activation(W_gate norm(x)) * W_up norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker_svc.backends.backend import Activation, Backend, Linear, Norm
from worker_svc.models.loader import Part, WeightReader
from worker_svc.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """One layer's, with its norm."""

    backend: Backend
    activation: Activation
    norm: Norm
    gate_up: Linear
    down: Linear

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Returns: [T, E], x with this layer's MLP added."""
        return self.down.add(self.backend.gate(self.gate_up(self.norm(x)), self.activation), x)


def read_mlp(spec: DecoderSpec, index: int, reader: WeightReader, backend: Backend) -> GatedMlp:
    layer, inner = f"model.layers.{index}", spec.intermediate_size
    norm = reader.tensor(f"{layer}.post_attention_layernorm.weight", (spec.hidden_size,))
    parts = [Part(f"{layer}.mlp.{part}_proj", inner) for part in ("gate", "up")]
    return GatedMlp(
        backend=backend,
        activation="silu",
        norm=backend.norm(norm, spec.rms_norm_eps),
        gate_up=reader.linear(parts, spec.hidden_size, has_bias=spec.mlp_bias),
        down=reader.linear((Part(f"{layer}.mlp.down_proj", spec.hidden_size),), inner, has_bias=spec.mlp_bias),
    )
