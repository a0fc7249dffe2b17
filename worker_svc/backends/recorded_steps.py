"""Steps of few tokens on a CPU as one call: the launches of a forward pass, recorded once for any number of rows.

Between kernels Python would take longer than most of them take, all the more when weights have just been through the
caches; and threads that wait for the next kernel would fall asleep. What differs from step to step stands in arrays
that stay where they are. A model whose pass has operations of torch is computed launch by launch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worker_svc.attention_plan import find_families, order_rows
from worker_svc.backends.backend import Batch, Ends
from worker_svc.cpu_kernels.attention import AttentionPlan
from worker_svc.cpu_kernels.launch import record
from worker_svc.step_input import StepInput

# What makes or views tensors, and computes nothing.
_HARMLESS: Final = {"empty", "view", "slice", "select", "unbind", "transpose", "permute", "view_as_complex", "alias"}


Plans = dict[int | None, AttentionPlan]


class RecordedSteps:
    """The recorded pass of one model."""

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        windows: Iterable[int | None],
        max_rows: int,
        max_ends: int,
    ) -> None:
        """Record.

        Args:
            forward: a pass over the model; it is called once, here.
            windows: of all attention layers.
            max_rows: of the steps to come.
            max_ends: how many of their rows have logits; another number.
        """
        assert max_ends < max_rows
        self._max_rows, self._max_ends = max_rows, max_ends
        self._token_ids, self._positions, self._slots = (array("q", bytes(8 * max_rows)) for _ in range(3))
        # Rows that have logits, which are all that the last layer goes on with.
        self._end_rows = array("q", bytes(8 * max_ends))
        self._plans: Plans = {window: AttentionPlan(is_recorded=True) for window in windows}
        self._end_plans: Plans = {window: AttentionPlan(is_recorded=True) for window in self._plans}
        batch = Batch(
            token_ids=_tensor(self._token_ids),
            positions=_tensor(self._positions),
            slots=_tensor(self._slots),
            attention=self._plans,
            logit_rows=None,
        )
        ends = Ends(_tensor(self._end_rows), replace(batch, attention=self._end_plans))
        with _Watch() as watch:
            self._launches, self._logits = record(lambda: forward(replace(batch, ends=ends)))
        self.is_whole = not watch.others

    def replay(self, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """As `runner.KnownSteps`."""
        count, num_ends = len(step.token_ids), len(step.logit_rows)
        if not self.is_whole or count > self._max_rows or num_ends > self._max_ends:
            return None
        rows, plans = self._plan(step)
        place = {row: i for i, row in enumerate(rows)}
        ends = step.ends()
        if num_ends == count:
            end_rows, end_plans, wanted = list(range(count)), plans, [place[row] for row in step.logit_rows]
        elif ends is not None:
            order, end_plans = self._plan(ends)
            end_rows = [place[step.logit_rows[i]] for i in order]
            wanted = sorted(range(num_ends), key=order.__getitem__)
        elif not num_ends:
            end_rows, end_plans, wanted = [], {window: AttentionPlan() for window in plans}, []
        else:
            return None
        if not (_take(self._plans, plans) and _take(self._end_plans, end_plans)):
            return None
        self._token_ids[:count] = array("q", [step.token_ids[row] for row in rows])
        self._positions[:count] = array("q", [step.positions[row] for row in rows])
        self._slots[:count] = array("q", [step.slot_mapping[row] for row in rows])
        self._end_rows[:num_ends] = array("q", end_rows)
        if last_tokens is not None:
            for row, source in step.pending:
                self._token_ids[place[row]] = int(last_tokens[source])
        self._launches.run(torch.get_num_threads(), count, num_ends)
        logits = self._logits[:num_ends]
        return logits if wanted == list(range(num_ends)) else logits[wanted]

    def _plan(self, step: StepInput) -> tuple[list[int], Plans]:
        """The step's rows in the order of attention, and what attends to what."""
        families = find_families(step)
        plans = {window: AttentionPlan(step, families, window) for window in self._plans}
        return order_rows(families, step.query_lens), plans


def _take(known: Plans, plans: Plans) -> bool:
    """Put plans where recorded launches look for them. Returns whether these cover them."""
    return all(known[window].take(plan) for window, plan in plans.items())


def _tensor(values: array[int]) -> torch.Tensor:
    """[N] int64, in the same memory."""
    return torch.frombuffer(values, dtype=torch.int64)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operations of torch compute something."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled by torch, and it would import its compiler to say so: 2 s of a worker's start.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others: set[str] = set()

    def __enter__(self) -> _Watch:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in _HARMLESS:
            self.others.add(name)
        return function(*args, **(kwargs or {}))
