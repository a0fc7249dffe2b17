"""When: which of the requests that wait for a model goes next.

A policy owns the waiting requests of one model, so that each can keep them as its rule needs: a heap, queues by
tenant, levels. The scheduler asks for the head, and takes it out when it has a place for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from weft.messages import TokenizedRequest


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the backlog. `ticket` counts arrivals; a request that is put back keeps its own."""

    request: TokenizedRequest
    ticket: int
    since: float  # monotonic seconds


class Fcfs:
    """First come, first served; but a stream that has begun, and lost its worker, goes before those that have not.

    Invariant: of two requests alike in that, the one that arrived first leaves first, whatever was put back between.
    No starvation, since the head waits for room and nothing passes it. Source: Orca (OSDI '22) section 3.2.
    """

    name = "fcfs"

    def __init__(self) -> None:
        self._heap: list[tuple[bool, int, str]] = []
        self._waiting: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._waiting.values()))

    def add(self, waiting: Waiting, now: float) -> None:
        """Mutates self. No request of that id may be waiting."""
        request = waiting.request
        self._waiting[request.request_id] = waiting
        heapq.heappush(self._heap, (request.epoch == 0, waiting.ticket, request.request_id))

    def head(self, now: float) -> Waiting | None:
        """The request that goes next; None if none waits."""
        while self._heap:
            _, ticket, request_id = self._heap[0]
            waiting = self._waiting.get(request_id)
            if waiting is not None and waiting.ticket == ticket:
                return waiting
            # It has left since.
            heapq.heappop(self._heap)
        return None

    def remove(self, request_id: str) -> None:
        """Mutates self. Raises KeyError if it does not wait."""
        del self._waiting[request_id]


ORDERS: Final[dict[str, type[Fcfs]]] = {"fcfs": Fcfs}
