"""How a model gets its weights: it asks for tensors by name and shape, and gets them packed for its device.

A model is built twice. First by a `Recorder`, which only notes what is asked for, so that a folder that lacks or
contradicts something is refused before any tensor is read, in one sentence; then by a `Loader`. So names and shapes
stand in one place, the code that uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from weft.errors import SettingsError
from worker_svc import rope
from worker_svc.backends.backend import Activation, Backend, Experts, Linear
from worker_svc.backends.composed import Reordering, SideBySide
from worker_svc.parallel.group import ALONE, Group
from worker_svc.parallel.linears import GatheredHead, SummedExperts, SummedLinear, head_rows
from worker_svc.quantization import (
    HEAD_KINDS,
    Reordered,
    StoredWeight,
    Weight,
    can_join,
    columns_of,
    contiguous,
    in_float,
    quantize,
    rows_of,
    side_by_side,
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a fused linear that a tensor of its own, or some rows of one, holds in the checkpoint."""

    name: str  # without ".weight"
    num_rows: int
    head_dim: int = 0  # 0, or the rows are heads of this size whose first `rotary_dim` channels get rotated
    rotary_dim: int = 0
    has_bias: bool = False
    first_row: int = 0  # in the tensor
    num_tensor_rows: int = 0  # 0 for just these
    is_shared: bool = False  # every rank of a group has such a part; the numbers here are one rank's


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """One expert's weights."""

    gate_up: Sequence[Part]
    down: Part


class WeightReader(Protocol):
    """What a model builds itself from."""

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        """One tensor, on the device and in the model's type."""

    def linear(self, parts: Sequence[Part], num_columns: int) -> Linear:
        """One linear of several side by side."""

    def output(self, part: Part, num_columns: int) -> Linear:
        """A linear on what shared parts put out; `num_columns`: those of one rank."""

    def matrix(self, name: str, shape: Shape) -> torch.Tensor:
        """One rank's rows of the weight of a linear, `name` without ".weight", in float whatever the checkpoint has."""

    def experts(self, parts: Sequence[ExpertParts], num_columns: int, activation: Activation) -> Experts:
        """Gated MLPs of one shape; `num_columns`: of gate and up."""

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

    def weight(self, name: str, shape: Shape) -> StoredWeight:
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

    def linear(self, parts: Sequence[Part], num_columns: int) -> Linear:
        for part in parts:
            if part.has_bias:
                self.tensor(f"{part.name}.bias", (_tensor_rows(part),))
        return self._backend.linear(self._weight(parts, num_columns), None)

    def output(self, part: Part, num_columns: int) -> Linear:
        return self.linear((part,), num_columns)

    def matrix(self, name: str, shape: Shape) -> torch.Tensor:
        self.asked.linears[name] = shape
        return torch.empty(shape, device="meta")

    def experts(self, parts: Sequence[ExpertParts], num_columns: int, activation: Activation) -> Experts:
        weights = [
            (self._weight(part.gate_up, num_columns), self._weight((part.down,), _inner_size(part))) for part in parts
        ]
        return self._backend.experts(weights, activation)

    def head(self, name: str, shape: Shape, tied: torch.Tensor | None) -> Linear:
        if tied is None:
            return self.linear((Part(name, shape[0]),), shape[1])
        self.asked.unread.add(f"{name}.weight")
        return self._backend.linear(tied, None)

    def _weight(self, parts: Sequence[Part], num_columns: int) -> torch.Tensor:
        for part in parts:
            self.asked.linears[part.name] = (_tensor_rows(part), num_columns)
        return torch.empty((sum(part.num_rows for part in parts), num_columns), device="meta")


class Loader:
    """Reads a checked source and packs what it gives for the backend."""

    def __init__(self, source: Source, backend: Backend, quantize: str = "none", group: Group = ALONE) -> None:
        """Read what one rank has.

        Args:
            quantize: a key of `QUANTIZERS` for float weights of linears, or "none".
            group: its ranks each have a `parallel.share.share_of` the model.
        """
        self._source = source
        self._backend = backend
        self._quantize = quantize
        self._group = group

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        # A copy in any case: a file's memory goes away with the checkpoint.
        return self._source.tensor(name, shape).to(self._backend.device, self._backend.dtype, copy=True)

    def linear(self, parts: Sequence[Part], num_columns: int) -> Linear:
        parts = [self._mine(part) for part in parts]
        weights = [self._rows(part, num_columns) for part in parts]
        if can_join(weights):
            return self._pack(side_by_side(weights), self._bias(parts))
        # Such as parts that were quantized in different ways, or one that was not.
        biases = [self._bias([part]) for part in parts]
        return SideBySide([self._pack(weight, bias) for weight, bias in zip(weights, biases, strict=True)])

    def output(self, part: Part, num_columns: int) -> Linear:
        if self._group.size == 1:
            return self.linear((part,), num_columns)
        bias = self._bias([part]) if self._group.rank == 0 else None
        return SummedLinear(self._pack(self._columns(part, num_columns), bias), self._group)

    def matrix(self, name: str, shape: Shape) -> torch.Tensor:
        num_rows, num_columns = shape
        weight = in_float(self._source.weight(name, (num_rows * self._group.size, num_columns)))
        mine = weight.narrow(0, num_rows * self._group.rank, num_rows)
        return mine.to(self._backend.device, self._backend.dtype, copy=True)

    def experts(self, parts: Sequence[ExpertParts], num_columns: int, activation: Activation) -> Experts:
        # One after the other, so that no more than one is held twice.
        weights = (self._expert(part, num_columns) for part in parts)
        experts = self._backend.experts(weights, activation)
        return experts if self._group.size == 1 else SummedExperts(experts, self._group)

    def head(self, name: str, shape: Shape, tied: torch.Tensor | None) -> Linear:
        weight = self._source.weight(name, shape) if tied is None else tied
        kind = HEAD_KINDS[self._quantize]
        if self._group.size == 1:
            return self._pack(self._quantized(weight, kind), None)
        rows = torch.arange(*head_rows(shape[0], self._group.rank, self._group.size))
        return GatheredHead(self._pack(self._quantized(rows_of(weight, rows), kind), None), shape[0], self._group)

    def _mine(self, part: Part) -> Part:
        """A rank's part, as rows of the whole tensor."""
        if not part.is_shared:
            return part
        size, rank = self._group.size, self._group.rank
        first = part.first_row * size + part.num_rows * rank
        return replace(part, first_row=first, num_tensor_rows=_tensor_rows(part) * size)

    def _expert(self, expert: ExpertParts, num_columns: int) -> tuple[Weight, Weight]:
        gate_up = [self._rows(self._mine(part), num_columns) for part in expert.gate_up]
        return self._joined(gate_up), self._joined([self._columns(expert.down, _inner_size(expert))])

    def _columns(self, part: Part, num_columns: int) -> StoredWeight:
        """A rank's columns of a whole tensor, quantized as those of one rank alone would be.

        Raises:
            SettingsError: they cut a group of columns in two.
        """
        size, start = self._group.size, num_columns * self._group.rank
        weight = self._source.weight(part.name, (part.num_rows, num_columns * size))
        if size == 1:
            return self._quantized(weight, self._quantize)
        if isinstance(weight, Reordered):
            # Each of its groups has channels of every rank.
            weight = in_float(weight)
        elif self._quantize != "none":
            weight = self._quantized(weight, self._quantize)
        assert not isinstance(weight, Reordered)
        try:
            mine = columns_of(weight, start, start + num_columns)
        except ValueError as error:
            raise SettingsError(f"tensor_parallel: {part.name} cannot be shared by {size} ranks: {error}") from error
        return self._quantized(contiguous(mine), "none")

    def _joined(self, weights: Sequence[StoredWeight]) -> Weight:
        """In float if parts were quantized in different ways or in an order of columns."""
        if not can_join(weights) or isinstance(weights[0], Reordered):
            weights = [in_float(weight).to(self._backend.device, self._backend.dtype) for weight in weights]
        joined = side_by_side(weights)
        assert not isinstance(joined, Reordered)
        return joined

    def _rows(self, part: Part, num_columns: int) -> StoredWeight:
        weight = self._source.weight(part.name, (_tensor_rows(part), num_columns))
        if isinstance(weight, torch.Tensor):
            # Of a file that is mapped, no more is read than these.
            weight = self._quantized(weight.narrow(0, part.first_row, part.num_rows), self._quantize)
            part = replace(part, first_row=0, num_tensor_rows=part.num_rows)
        return weight if _is_whole(part) else rows_of(weight, _row_order(part))

    def _quantized(self, weight: StoredWeight, kind: str) -> StoredWeight:
        if not isinstance(weight, torch.Tensor):
            return weight
        weight = weight.to(self._backend.device, self._backend.dtype)
        return weight if kind == "none" else quantize(weight, kind)

    def _pack(self, weight: StoredWeight, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, Reordered):
            return Reordering(self._backend.linear(weight.weight, bias), weight.order.to(self._backend.device))
        return self._backend.linear(weight, bias)

    def _bias(self, parts: Sequence[Part]) -> torch.Tensor | None:
        """Zeros for parts that have none, unless no part has one."""
        if not any(part.has_bias for part in parts):
            return None
        return torch.cat([self._bias_rows(part) for part in parts])

    def _bias_rows(self, part: Part) -> torch.Tensor:
        if not part.has_bias:
            return torch.zeros(part.num_rows, dtype=self._backend.dtype, device=self._backend.device)
        return self.tensor(f"{part.name}.bias", (_tensor_rows(part),))[_row_order(part)]


def _tensor_rows(part: Part) -> int:
    return part.num_tensor_rows or part.num_rows


def _inner_size(part: ExpertParts) -> int:
    return part.gate_up[0].num_rows


def _is_whole(part: Part) -> bool:
    """Whether the part is its tensor, row for row."""
    return not part.head_dim and part.num_rows == _tensor_rows(part)


def _row_order(part: Part) -> torch.Tensor:
    """Where the part's rows are in the tensor: [num_rows] int64."""
    if not part.head_dim:
        return torch.arange(part.first_row, part.first_row + part.num_rows)
    return part.first_row + rope.interleaved_order(part.num_rows // part.head_dim, part.head_dim, part.rotary_dim)
