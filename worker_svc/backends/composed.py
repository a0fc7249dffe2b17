"""Linears made of linears, on any backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker_svc.backends.backend import Linear


class SideBySide:
    """The outputs of several linears of one input, joined: for weights that no one kernel takes together."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = list(linears)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self._linears], dim=-1)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))


class Reordering:
    """A linear that takes the channels of its input in an order of its own."""

    def __init__(self, linear: Linear, order: torch.Tensor) -> None:
        """`order`: [in] int64, on the device."""
        self._linear = linear
        self._order = order

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x.index_select(-1, self._order))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._linear.add(x.index_select(-1, self._order), residual)
