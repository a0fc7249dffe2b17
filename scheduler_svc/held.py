"""What was sent to workers and has not ended, as far as this scheduler knows. Pure.

It knows of each request that it sent itself, until the worker says that it has ended, or dies, or is idle. Only
predictions are made of this, so what is missing costs accuracy and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler_svc.policy.admit import Held
from scheduler_svc.policy.order import Waiting
from scheduler_svc.workers import LOST_AFTER_S, Worker
from weft.messages import WorkerStatus


@dataclass(slots=True)
class Entry:
    """One request in a worker."""

    model: str
    worker: str
    held: Held
    num_choices: int
    remaining_each: float  # predicted tokens of a choice
    num_generated_each: int


class HeldBook:
    """By request id, the last epoch sent."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._of_worker: dict[str, dict[str, None]] = {}

    def send(self, waiting: Waiting, worker: Worker, ttft_s: float | None, now: float) -> None:
        """Book what is sent now. Mutates self."""
        request, choices = waiting.request, len(waiting.request.choices)
        self.end(request.request_id)
        begins = now + (ttft_s or 0.0)
        held = Held(request.num_tokens, now, begins + waiting.remaining / choices * worker.status.step_s)
        self._entries[request.request_id] = Entry(
            request.model, worker.name, held, choices, waiting.remaining / choices, waiting.num_generated // choices
        )
        self._of_worker.setdefault(worker.name, {})[request.request_id] = None

    def end_choice(self, request_id: str) -> Entry | None:
        """A choice has ended; returns what was known of its request, if it was sent from here. Mutates self."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.num_choices -= 1
            if not entry.num_choices:
                self.end(request_id)
        return entry

    def end(self, request_id: str) -> None:
        """Forget a request, if it is known. Mutates self."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            del self._of_worker[entry.worker][request_id]

    def on_status(self, status: WorkerStatus, now: float) -> None:
        """An idle worker has ended all that it was sent, but for what is on its way still. Mutates self."""
        if status.num_running or status.num_waiting:
            return
        for request_id in list(self._of_worker.get(status.worker, ())):
            if now - self._entries[request_id].held.since > LOST_AFTER_S:
                self.end(request_id)

    def worker_gone(self, worker: str) -> None:
        """Mutates self."""
        for request_id in list(self._of_worker.pop(worker, ())):
            del self._entries[request_id]

    def of_model(self, model: str) -> list[Held]:
        return [entry.held for entry in self._entries.values() if entry.model == model]
