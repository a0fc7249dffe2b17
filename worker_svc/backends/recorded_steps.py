"""Decode steps of a CPU as one call: the launches of a forward pass, recorded once for the most rows there can be.

Between kernels Python would take longer than most of them, all the more when weights have just been through the
caches. What differs from step to step stands in tensors that stay where they are. A model whose pass has operations
that cannot be recorded is computed launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worker_svc.attention_plan import Family, plan_units
from worker_svc.backends.backend import AttentionKind, Batch
from worker_svc.cpu_kernels.launch import Launches, record
from worker_svc.cpu_kernels.paged_attention import RowPlan
from worker_svc.step_input import StepInput

# What makes or views tensors, and computes nothing.
_HARMLESS: Final = {"empty", "view", "slice", "select", "unbind", "transpose", "permute", "view_as_complex", "alias"}


class RecordedSteps:
    """The recorded pass of one model."""

    def __init__(self, forward: Callable[[Batch], torch.Tensor], kinds: Iterable[AttentionKind], max_rows: int) -> None:
        """`forward`: a pass over the model; it is called once, here."""
        kinds = tuple(kinds)
        self._max_rows = max_rows
        self._columns = torch.zeros(3, max_rows, dtype=torch.int64)
        self._plans = {window: RowPlan() for window in {kind.window for kind in kinds}}
        # The attention of latents is torch's.
        is_ours = all(kind.value_dim is None for kind in kinds)
        self._launches, self._logits = self._record(forward) if is_ours else (None, torch.empty(0))

    def replay(self, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """As `runner.KnownSteps`."""
        count = len(step.token_ids)
        if self._launches is None or not _is_decode(step) or count > self._max_rows:
            return None
        columns = torch.tensor([step.token_ids, step.positions, step.slot_mapping])
        if step.pending and last_tokens is not None:
            rows, sources = (list(column) for column in zip(*step.pending, strict=True))
            columns[0, rows] = last_tokens[sources]
        self._columns[:, :count] = columns
        families = [Family((i,)) for i in range(count)]
        for window, plan in self._plans.items():
            plan.fill(plan_units(families, step, window))
        self._launches.run(torch.get_num_threads(), count)
        return self._logits[:count]

    def _record(self, forward: Callable[[Batch], torch.Tensor]) -> tuple[Launches | None, torch.Tensor]:
        from worker_svc.backends.numba_backend import AttentionPlan

        token_ids, positions, slots = self._columns.unbind(0)
        attention = {window: AttentionPlan(plan, ()) for window, plan in self._plans.items()}
        watch = _Watch()
        with watch:
            launches, logits = record(lambda: forward(Batch(token_ids, positions, slots, attention, None)))
        return (None if watch.others else launches), logits


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operations of torch compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in _HARMLESS:
            self.others.add(name)
        return function(*args, **(kwargs or {}))


def _is_decode(step: StepInput) -> bool:
    """Whether every sequence has one token to compute, and wants its logits."""
    count = len(step.token_ids)
    return count == len(step.query_lens) and step.logit_rows == list(range(count))
