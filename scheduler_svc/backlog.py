"""The requests that wait here, by model and by id. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scheduler_svc.policy.order import OrderPolicy, Waiting


@dataclass(slots=True)
class _Queue:
    order: OrderPolicy
    num_tokens: int = 0
    num_new_tokens: float = 0.0


class Backlog:
    """Waiting requests; of a request id, one epoch at most."""

    def __init__(self, make_order: Callable[[str], OrderPolicy]) -> None:
        """`make_order`: an empty queue for a model."""
        self._make_order = make_order
        self._queues: dict[str, _Queue] = {}
        self._by_id: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._by_id.values()))

    def get(self, request_id: str) -> Waiting | None:
        return self._by_id.get(request_id)

    def models(self) -> list[str]:
        """Those for which something waits."""
        return [model for model, queue in self._queues.items() if len(queue.order)]

    def order(self, model: str) -> OrderPolicy:
        """The queue of a model. It stays when it is empty, since some policies remember who had what."""
        return self._queue(model).order

    def count(self, model: str) -> int:
        queue = self._queues.get(model)
        return len(queue.order) if queue else 0

    def num_tokens(self, model: str) -> int:
        """Tokens to be prefilled."""
        return self._queues[model].num_tokens if model in self._queues else 0

    def num_new_tokens(self, model: str) -> float:
        """Tokens to be generated, as predicted."""
        return self._queues[model].num_new_tokens if model in self._queues else 0.0

    def add(self, waiting: Waiting, now: float) -> None:
        """Mutates self. No request of that id may wait already."""
        request = waiting.request
        queue = self._queue(request.model)
        queue.order.add(waiting, now)
        queue.num_tokens += request.num_tokens
        queue.num_new_tokens += waiting.remaining
        self._by_id[request.request_id] = waiting

    def remove(self, request_id: str) -> Waiting:
        """Mutates self. Raises KeyError if it does not wait."""
        waiting = self._by_id.pop(request_id)
        request = waiting.request
        queue = self._queues[request.model]
        queue.order.remove(request_id)
        queue.num_tokens -= request.num_tokens
        queue.num_new_tokens = queue.num_new_tokens - waiting.remaining if len(queue.order) else 0.0
        return waiting

    def head(self, model: str, now: float) -> Waiting | None:
        """The request that goes next; None if none waits for the model."""
        queue = self._queues.get(model)
        return queue.order.head(now) if queue else None

    def reorder(self, model: str, now: float) -> None:
        """Wait in a new queue, as `make_order` makes them now. Mutates self."""
        before = self._queues.pop(model, None)
        for waiting in sorted(before.order, key=lambda waiting: waiting.ticket) if before else ():
            self.add(waiting, now)

    def forget(self, model: str) -> None:
        """Drop an empty queue, and what it remembers. Mutates self."""
        if model in self._queues and not len(self._queues[model].order):
            del self._queues[model]

    def _queue(self, model: str) -> _Queue:
        if model not in self._queues:
            self._queues[model] = _Queue(self._make_order(model))
        return self._queues[model]
