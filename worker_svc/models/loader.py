"""How a model gets its weights: it asks for tensors by name and shape, and gets them packed for its device.

A model is built twice. First by a `Recorder`, which only notes what is asked for, so that a folder that lacks or
contradicts something is refused before any tensor is read, in one sentence; then by a `Loader`. So names and shapes
stand in one place, the code that uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from worker_svc import rope
from worker_svc.backends.backend import Backend, Linear
from worker_svc.quantization import QUANTIZERS, Weight, rows_of, side_by_side

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a fused linear that a tensor of its own holds in the checkpoint."""

    name: str  # without ".weight"
    num_rows: int
    head_dim: int = 0  # 0, or the rows are heads of this size whose first `rotary_dim` channels get rotated
    rotary_dim: int = 0


class WeightReader(Protocol):
    """What a model builds itself from."""

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        """One tensor, on the device and in the model's type."""

    def linear(self, parts: Sequence[Part], num_columns: int, *, has_bias: bool) -> Linear:
        """One linear of several side by side."""

    def head(self, name: str, shape: Shape, tied: torch.Tensor | None) -> Linear:
        """The last linear, from hidden to vocabulary; `tied`: the embedding, where that is its weight as well."""


class Source(Protocol):
    """Where weights come from: a checkpoint of some format, or nowhere."""

    def check(self, asked: Asked) -> None:
        """Compare with what the model asks for.

        Raises:
            SettingsError: names what is missing, unknown or wrong.
        """

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        """On any device and in any float type; may share memory with the source."""

    def weight(self, name: str, shape: Shape) -> Weight:
        """The weight of the linear called `name`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model asks for."""

    tensors: dict[str, Shape]  # by name: embeddings, norms, biases
    linears: dict[str, Shape]  # by name without ".weight": [out, in]
    unread: set[str]  # tensors that may be there, and are not read

    def by_tensor(self) -> dict[str, Shape]:
        """Every tensor of a checkpoint in float."""
        return self.tensors | {f"{name}.weight": shape for name, shape in self.linears.items()}


class Recorder:
    """Notes what is asked for, and gives tensors without content."""

    def __init__(self, backend: Backend) -> None:
        self.asked = Asked({}, {}, set())
        self._backend = backend

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        self.asked.tensors[name] = shape
        return torch.empty(shape, device="meta")

    def linear(self, parts: Sequence[Part], num_columns: int, *, has_bias: bool) -> Linear:
        for part in parts:
            self.asked.linears[part.name] = (part.num_rows, num_columns)
            if has_bias:
                self.tensor(f"{part.name}.bias", (part.num_rows,))
        return self._backend.linear(
            torch.empty((sum(part.num_rows for part in parts), num_columns), device="meta"), None
        )

    def head(self, name: str, shape: Shape, tied: torch.Tensor | None) -> Linear:
        if tied is None:
            return self.linear((Part(name, shape[0]),), shape[1], has_bias=False)
        self.asked.unread.add(f"{name}.weight")
        return self._backend.linear(tied, None)


class Loader:
    """Reads a checked source and packs what it gives for the backend."""

    def __init__(self, source: Source, backend: Backend, quantize: str = "none") -> None:
        """`quantize`: a key of `QUANTIZERS` for float weights of linears, or "none"."""
        self._source = source
        self._backend = backend
        self._quantize = QUANTIZERS.get(quantize)

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        # A copy in any case: a file's memory goes away with the checkpoint.
        return self._source.tensor(name, shape).to(self._backend.device, self._backend.dtype, copy=True)

    def linear(self, parts: Sequence[Part], num_columns: int, *, has_bias: bool) -> Linear:
        weight = side_by_side([self._rows(part, num_columns) for part in parts])
        return self._backend.linear(weight, self._bias(parts) if has_bias else None)

    def head(self, name: str, shape: Shape, tied: torch.Tensor | None) -> Linear:
        if tied is None:
            return self.linear((Part(name, shape[0]),), shape[1], has_bias=False)
        return self._backend.linear(tied, None)

    def _rows(self, part: Part, num_columns: int) -> Weight:
        weight = self._source.weight(part.name, (part.num_rows, num_columns))
        if isinstance(weight, torch.Tensor):
            weight = weight.to(self._backend.device, self._backend.dtype)
            if self._quantize is not None:
                weight = self._quantize(weight)
        return weight if not part.head_dim else rows_of(weight, _interleaved_rows(part))

    def _bias(self, parts: Sequence[Part]) -> torch.Tensor:
        biases = [self.tensor(f"{part.name}.bias", (part.num_rows,)) for part in parts]
        return torch.cat(
            [bias[_interleaved_rows(part)] if part.head_dim else bias for bias, part in zip(biases, parts, strict=True)]
        )


def _interleaved_rows(part: Part) -> torch.Tensor:
    return rope.interleaved_order(part.num_rows // part.head_dim, part.head_dim, part.rotary_dim)
