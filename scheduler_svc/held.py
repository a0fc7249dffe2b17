"""What was sent to workers and has not ended, as far as this scheduler knows. Pure.

It knows of each request that it sent itself, until the worker says that it has ended, or dies, or is idle. Only
predictions are made of this, so what is missing costs accuracy and nothing else.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec

from scheduler_svc.ends import End, Ends
from scheduler_svc.policy.order import Waiting
from scheduler_svc.policy.predict import Guess
from scheduler_svc.workers import LOST_AFTER_S, Worker
from weft.errors import InvariantViolation
from weft.messages import WorkerStatus


class Entry(msgspec.Struct):
    """One request in a worker."""

    model: str
    worker: str
    num_tokens: int  # of its prompt, and what was generated before
    sent_at: float  # monotonic seconds
    ends_at: float  # as predicted
    num_choices: int
    remaining_each: float  # predicted tokens of a choice
    num_generated_each: int
    guess: Guess | None  # what the prediction was made of


class HeldBook:
    """By request id, the last epoch sent."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._of_worker: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._ends: dict[str, Ends] = {}  # by model, of those that were asked about

    def send(self, waiting: Waiting, worker: Worker, ttft_s: float | None, now: float) -> None:
        """Book what is sent now. Mutates self."""
        request, choices = waiting.request, len(waiting.request.choices)
        self.end(request.request_id)
        remaining = waiting.remaining / choices
        entry = Entry(
            model=request.model,
            worker=worker.name,
            num_tokens=request.num_tokens,
            sent_at=now,
            ends_at=now + (ttft_s or 0.0) + remaining * worker.status.step_s,
            num_choices=choices,
            remaining_each=remaining,
            num_generated_each=waiting.num_generated // choices,
            guess=waiting.guess,
        )
        self._entries[request.request_id] = entry
        self._of_worker[worker.name][request.request_id] = None
        if request.model in self._ends:
            self._ends[request.model].add((entry.ends_at, entry.num_tokens))

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
            if entry.model in self._ends:
                self._ends[entry.model].remove((entry.ends_at, entry.num_tokens))

    def on_status(self, status: WorkerStatus, now: float) -> None:
        """An idle worker has ended all that it was sent, but for what is on its way still. Mutates self."""
        if status.num_running or status.num_waiting:
            return
        for request_id in list(self._of_worker.get(status.worker, ())):
            if now - self._entries[request_id].sent_at > LOST_AFTER_S:
                self.end(request_id)

    def worker_gone(self, worker: str) -> None:
        """Mutates self."""
        for request_id in list(self._of_worker.get(worker, ())):
            self.end(request_id)
        self._of_worker.pop(worker, None)

    def ends(self, model: str) -> Ends:
        """When those of a model are predicted to end. Mutates self: they are kept up from the first time on."""
        if model not in self._ends:
            ends = self._ends[model] = Ends()
            for entry in self._entries.values():
                if entry.model == model:
                    ends.add((entry.ends_at, entry.num_tokens))
        return self._ends[model]

    def check(self) -> None:
        """Raises InvariantViolation if the books do not balance."""
        ends: dict[str, list[End]] = {model: [] for model in self._ends}
        for entry in self._entries.values():
            if entry.model in ends:
                ends[entry.model].append((entry.ends_at, entry.num_tokens))
        if {model: list(found) for model, found in self._ends.items()} != {m: sorted(e) for m, e in ends.items()}:
            raise InvariantViolation("the ends of requests are not those of the entries")
        if {(name, entry.worker) for name, entry in self._entries.items()} != {
            (name, worker) for worker, names in self._of_worker.items() for name in names
        }:
            raise InvariantViolation("the requests of workers are not those of the entries")
