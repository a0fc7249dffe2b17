"""Steps of few tokens on a CPU as one call: the launches of a forward pass, recorded once for any number of rows.

Between kernels Python would take longer than most of them take, all the more when weights have just been through the
caches. What differs from step to step stands in tensors that stay where they are. A model whose pass has operations of
torch is computed launch by launch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worker_svc.attention_plan import find_families, order_rows, plan_units
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
        windows: Iterable[int | None],
        max_rows: int,
    ) -> None:
        """Record.

        Args:
            forward: a pass over the model; it is called once, here.
            windows: of all attention layers.
            max_rows: of the steps to come.
        """
        self._max_rows = max_rows
        self._token_ids, self._positions, self._slots = (array("q", bytes(8 * max_rows)) for _ in range(3))
        self._plans = {window: AttentionPlan(is_recorded=True) for window in windows}
        batch = Batch(
            token_ids=torch.frombuffer(self._token_ids, dtype=torch.int64),
            positions=torch.frombuffer(self._positions, dtype=torch.int64),
            slots=torch.frombuffer(self._slots, dtype=torch.int64),
            attention=self._plans,
            logit_rows=None,
        )
        with _Watch() as watch:
            self._launches, self._logits = record(lambda: forward(batch))
        self.is_whole = not watch.others

    def replay(self, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        """As `runner.KnownSteps`."""
        count = len(step.token_ids)
        if not self.is_whole or count > self._max_rows or len(step.logit_rows) < count:
            return None
        families = find_families(step)
        if not all(plan.take(AttentionPlan(plan_units(families, step, w))) for w, plan in self._plans.items()):
            return None
        rows = order_rows(families, step.query_lens)
        self._token_ids[:count] = array("q", [step.token_ids[row] for row in rows])
        self._positions[:count] = array("q", [step.positions[row] for row in rows])
        self._slots[:count] = array("q", [step.slot_mapping[row] for row in rows])
        place = {row: new for new, row in enumerate(rows)}
        if last_tokens is not None:
            for row, source in step.pending:
                self._token_ids[place[row]] = int(last_tokens[source])
        self._launches.run(torch.get_num_threads(), count)
        logits = self._logits[:count]
        wanted = [place[row] for row in step.logit_rows]
        return logits if wanted == list(range(count)) else logits[wanted]


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
