"""The workers that a scheduler knows, by name and by model, and what is on its way to each. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler_svc.pool import Pool
from scheduler_svc.totals import Totals
from scheduler_svc.workers import InFlight, Worker
from weft.errors import InvariantViolation
from weft.messages import WorkerStatus


@dataclass(slots=True)
class _OfModel:
    num_workers: int = 0
    open: Pool = field(default_factory=Pool)
    ready: Totals = field(default_factory=Totals)


class Fleet:
    """Workers, and for each model those with room and those that are ready, kept up with each change of one."""

    def __init__(self) -> None:
        self.num_schedulers = 1  # that share the workers' room
        self._workers: dict[str, Worker] = {}
        self._models: dict[str, _OfModel] = {}
        self._in_flight: dict[tuple[str, int], str] = {}  # (request id, epoch) → worker

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        """In no order. They may be removed meanwhile."""
        return iter(list(self._workers.values()))

    def __getitem__(self, name: str) -> Worker:
        """Raises KeyError if it is not there."""
        return self._workers[name]

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def models(self) -> list[str]:
        """Those of any worker, ready or not."""
        return list(self._models)

    def count(self, model: str) -> int:
        """Workers of a model, ready or not."""
        return self._models[model].num_workers if model in self._models else 0

    def open(self, model: str) -> Pool:
        """Those with room."""
        return self._models[model].open if model in self._models else Pool()

    def ready(self, model: str) -> Totals:
        return self._models[model].ready if model in self._models else Totals()

    def add(self, worker: Worker) -> None:
        """A worker of which nothing was known. Mutates self."""
        self._workers[worker.name] = worker
        self._models.setdefault(worker.status.model, _OfModel()).num_workers += 1

    def remove(self, name: str) -> Worker:
        """Forget a worker, and its model with the last one of it. Mutates self. Raises KeyError if it is not there."""
        worker = self._workers.pop(name)
        for key in worker.in_flight:
            del self._in_flight[key]
        model = self._models[worker.status.model]
        model.open.discard(worker)
        model.ready.discard(worker)
        model.num_workers -= 1
        if not model.num_workers:
            del self._models[worker.status.model]
        return worker

    def refresh(self, worker: Worker) -> None:
        """After anything about a worker changed: its room, and what is known of those of its model together."""
        worker.refresh(self.num_schedulers)
        model = self._models[worker.status.model]
        if worker.room:
            model.open.put(worker)
        else:
            model.open.discard(worker)
        if worker.status.state == "ready":
            model.ready.put(worker)
        else:
            model.ready.discard(worker)

    # ---- what is on its way ----

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def bound_for(self, key: tuple[str, int]) -> Worker | None:
        """The worker that an assignment is on its way to; None if it is not."""
        name = self._in_flight.get(key)
        return None if name is None else self._workers[name]

    def send(self, worker: Worker, flight: InFlight, number: int) -> None:
        """Book a dispatch; `number` counts dispatches. Mutates self."""
        worker.send(flight, number)
        self._in_flight[flight.key] = worker.name
        self.refresh(worker)

    def take_back(self, worker: Worker, key: tuple[str, int]) -> InFlight | None:
        """Unbook what does not stay there. The caller refreshes the worker. Mutates self."""
        flight = worker.take_back(key)
        if flight is not None:
            del self._in_flight[key]
        return flight

    def apply(self, worker: Worker, status: WorkerStatus, scheduler: str, now: float) -> int:
        """Take in a newer status of the same life. Returns: how many assignments it shows to be lost. Mutates self."""
        arrived, lost = worker.apply(status, scheduler, now)
        for flight in (*arrived, *lost):
            del self._in_flight[flight.key]
        self.refresh(worker)
        return len(lost)

    def check(self) -> None:
        """Raises InvariantViolation if the books do not balance."""
        flights = {key: worker.name for worker in self for key in worker.in_flight}
        if flights != self._in_flight:
            raise InvariantViolation("assignments on their way differ from those of the workers")
        for worker in self:
            counted = sum(flight.num_choices for flight in worker.in_flight.values())
            is_open = worker.name in self._models[worker.status.model].open
            if counted != worker.num_on_the_way or is_open != bool(worker.room):
                raise InvariantViolation(f"the room of {worker.name} is not what its books say")
        for name, model in self._models.items():
            workers = [worker for worker in self if worker.status.model == name]
            ready = Totals(worker for worker in workers if worker.status.state == "ready")
            if model.num_workers != len(workers) or not model.ready.is_same(ready):
                raise InvariantViolation(f"the totals of {name} are not those of its workers")
