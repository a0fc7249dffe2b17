"""Attention of one step: rows that see what no other row does one by one, all others by tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from worker_svc import attention
from worker_svc.attention_plan import Family, Unit, plan_units
from worker_svc.backends.backend import AttentionKind
from worker_svc.cpu_kernels.launch import empty_rows
from worker_svc.cpu_kernels.paged_attention import RowPlan, paged_attention
from worker_svc.cpu_kernels.segments import plan_groups
from worker_svc.cpu_kernels.tiled_attention import TilePlan, can_attend, tiled_attention
from worker_svc.step_input import StepInput

# Rows of a group so few that each reading all of its context is faster than tiles: with 160 keys 0.16 ms for 16 groups
# of one row where tiles took 0.28, and 0.18 ms for 4 of five rows where they took 0.16 (AMD EPYC with AVX-512, 2026).
MAX_SINGLE_ROWS: Final = 4


class AttentionPlan:
    """What attends to what, for one window."""

    def __init__(
        self,
        step: StepInput | None = None,
        families: Sequence[Family] = (),
        window: int | None = None,
        *,
        is_recorded: bool = False,
    ) -> None:
        """`step`: None for no rows; `is_recorded`: launches are noted before anyone knows what there will be to do."""
        groups = [] if step is None else list(plan_groups(families, step, window))
        self._step, self._families, self._window = step, families, window
        self.is_recorded = is_recorded
        self.is_whole = True  # as far as it was recorded
        self.has_tiles = any(group.num_rows > MAX_SINGLE_ROWS for group in groups)
        self.rows = RowPlan(group for group in groups if group.num_rows <= MAX_SINGLE_ROWS)
        self.tiles = TilePlan(group for group in groups if group.num_rows > MAX_SINGLE_ROWS)

    def units(self) -> list[Unit]:
        """What tiles are for, in the form that torch attends to."""
        units = () if self._step is None else plan_units(self._families, self._step, self._window)
        return [unit for unit in units if unit.num_rows > MAX_SINGLE_ROWS]

    def take(self, other: AttentionPlan) -> bool:
        """Become this plan, in the place where recorded launches look for it. Returns whether they cover it."""
        self.has_tiles = other.has_tiles
        self.rows.take(other.rows)
        self.tiles.take(other.tiles)
        return self.is_whole or not self.has_tiles


def attend(q: torch.Tensor, kv: torch.Tensor, plan: AttentionPlan, kind: AttentionKind) -> torch.Tensor:
    """As `Backend.attend`, for float32 and values that are cached after the keys."""
    out = empty_rows(len(q), q.shape[1] * q.shape[2])
    if plan.is_recorded or plan.rows.num_rows:
        paged_attention(q, kv, plan.rows, out, softmax_scale=kind.softmax_scale, soft_cap=kind.soft_cap)
    if can_attend(q.shape[2]):
        if plan.is_recorded or plan.has_tiles:
            tiled_attention(q, kv, plan.tiles, out, softmax_scale=kind.softmax_scale, soft_cap=kind.soft_cap)
    elif plan.is_recorded:
        plan.is_whole = False
    elif plan.has_tiles:
        attention.attend(q, kv, plan.units(), kind, out)
    return out
