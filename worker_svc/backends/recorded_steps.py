"""Steps of few tokens on a CPU as one call: the launches of a forward pass, recorded once for any number of rows.

Between kernels Python would take longer than most of them take, all the more when weights have just been through the
caches. What differs from step to step stands in tensors that stay where they are. A model whose pass has operations of
torch is computed launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worker_svc.backends.backend import Batch
from worker_svc.cpu_kernels.attention import AttentionPlan
from worker_svc.cpu_kernels.launch import record
from worker_svc.step_input import StepInput

# What makes or views tensors, and computes nothing.
_HARMLESS: Final = {"empty", "view", "slice", "select", "unbind", "transpose", "permute", "view_as_complex", "alias"}


class RecordedSteps:
    """The recorded pass of one model."""

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        make_batch: Callable[[StepInput, torch.Tensor | None], Batch],
        windows: Iterable[int | None],
        max_rows: int,
    ) -> None:
        """Record.

        Args:
            forward: a pass over the model; it is called once, here.
            make_batch: what makes a step into a batch, given the tokens that pending ones are taken from.
            windows: of all attention layers.
            max_rows: of the steps to come.
        """
        self._make_batch = make_batch
        self._max_rows = max_rows
        self._columns = torch.zeros(3, max_rows, dtype=torch.int64)
        self._plans = {window: AttentionPlan(is_recorded=True) for window in windows}
        token_ids, positions, slots = self._columns.unbind(0)
        batch = Batch(token_ids, positions, slots, self._plans, None)
        with _Watch() as watch:
            self._launches, self._logits = record(lambda: forward(batch))
        self.is_whole = not watch.others

    def replay(self, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """As `runner.KnownSteps`."""
        count = len(step.token_ids)
        if not self.is_whole or count > self._max_rows or len(step.logit_rows) < count:
            return None
        batch = self._make_batch(step, last_tokens)
        for known, column in zip(self._columns, (batch.token_ids, batch.positions, batch.slots), strict=True):
            known[:count] = column
        if not all(plan.take(batch.attention[window]) for window, plan in self._plans.items()):
            return None
        self._launches.run(torch.get_num_threads(), count)
        logits = self._logits[:count]
        return logits if batch.logit_rows is None else logits.index_select(0, batch.logit_rows)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operations of torch compute something."""

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
