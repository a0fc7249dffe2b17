"""Linears and experts of which each rank of a group has a share."""

from __future__ import annotations

import torch

from worker_svc.backends.backend import Experts, Linear
from worker_svc.parallel.group import Group


class SummedLinear:
    """Each rank has some of the input's channels. The bias is rank 0's."""

    def __init__(self, linear: Linear, group: Group) -> None:
        self._linear = linear
        self._group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.add_up(self._linear(x))

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        # All have the same residual, and it counts once.
        return self._group.add_up(self._linear.add(x, residual) if self._group.rank == 0 else self._linear(x))


class SummedExperts:
    """Each rank has some of every expert's inner channels."""

    def __init__(self, experts: Experts, group: Group) -> None:
        self._experts = experts
        self._group = group

    def add(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        once = residual if self._group.rank == 0 else torch.zeros_like(residual)
        return self._group.add_up(self._experts.add(x, expert_ids, weights, once))


class GatheredHead:
    """Each rank has some of the vocabulary's rows, as `head_rows` says; rank 0 gets all logits, others their own."""

    def __init__(self, linear: Linear, num_rows: int, group: Group) -> None:
        """`num_rows`: of all ranks together."""
        self._linear = linear
        self._num_rows = num_rows
        self._group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not len(x):
            # A step in which every prompt goes on.
            return x.new_empty(0, self._num_rows)
        mine = self._linear(x)
        parts = self._group.gather(mine)
        return torch.cat([part[:, self._num_repeated(rank) :] for rank, part in enumerate(parts)], 1) if parts else mine

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + self(x)

    def _num_repeated(self, rank: int) -> int:
        """How many of a rank's first rows the ranks before it have as well."""
        start, stop = head_rows(self._num_rows, rank, self._group.size)
        return min(stop, rank * (stop - start)) - start


def head_rows(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """From which row to which a rank has: as many on each, so that the last ones may repeat some of others'."""
    count = -(-num_rows // size)
    start = min(rank * count, num_rows - count)
    return start, start + count
