"""What the parts of a decoder are built with: names and shapes come from the parts, the rest from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from worker_svc.backends.backend import Backend, Linear, Norm
from worker_svc.models.loader import Part, WeightReader
from worker_svc.models.spec import DecoderSpec


class Output(Protocol):
    """What adds to the residual: a linear, or one that is normed."""

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Returns: [T, E], `residual` with this added; may overwrite it."""


@dataclass(frozen=True, slots=True)
class NormedOutput:
    linear: Linear
    norm: Norm

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + self.norm(self.linear(x))


@dataclass(frozen=True, slots=True)
class Builder:
    spec: DecoderSpec
    reader: WeightReader
    backend: Backend

    def norm(self, name: str, size: int, eps: float | None = None) -> Norm:
        """`eps`: None for the model's."""
        return self.backend.norm(self.norm_weight(name, size), self.spec.rms_norm_eps if eps is None else eps)

    def norm_weight(self, name: str, size: int) -> torch.Tensor:
        """[size]; float32 if it is not as the checkpoint has it, since what differs from one is small."""
        weight = self.reader.tensor(f"{name}.weight", (size,))
        return weight.float() + self.spec.norm_offset if self.spec.norm_offset else weight

    def output(self, part: Part, num_columns: int, post_norm: str) -> Output:
        """`post_norm`: the name of the norm of what is added, in models that have such."""
        linear = self.reader.output(part, num_columns)
        return NormedOutput(linear, self.norm(post_norm, part.num_rows)) if self.spec.has_post_norms else linear
