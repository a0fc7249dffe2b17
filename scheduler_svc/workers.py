"""One worker as a scheduler sees it: its last status, and what was sent to it that the status does not know of yet.

Pure. A worker counts the sequences that it ever accepted from this scheduler; what was sent beyond that count is on
the way, and takes room as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from scheduler_svc.policy.order import Waiting
from weft.messages import TokenizedRequest, WorkerStatus

# An assignment that no status has accounted for after this long got lost on the way. The gateway recovers it.
LOST_AFTER_S: Final = 3.0


class InFlight(msgspec.Struct, frozen=True):
    """An assignment on its way."""

    waiting: Waiting
    sent_at: float

    @property
    def request(self) -> TokenizedRequest:
        return self.waiting.request

    @property
    def ticket(self) -> int:
        return self.waiting.ticket

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.request.epoch

    @property
    def num_choices(self) -> int:
        return len(self.request.choices)


Rank = tuple[float, int, int, str]


@dataclass(slots=True)
class Worker:
    """`bit` is the worker's place in the block index's masks; `room` is this scheduler's share of what is free."""

    name: str
    bit: int
    status: WorkerStatus
    seen_at: float
    room: int = 0
    load: int = 0  # sequences held or on their way
    waiting_tokens: int = 0  # to be computed before a new request's turn, those on their way included
    rank: Rank = (0.0, 0, 0, "")  # the least loaded has the least
    last_used: int = 0  # number of the dispatch that last went here
    is_full: bool = False  # it declined, and has not been heard of since
    in_flight: dict[tuple[str, int], InFlight] = field(default_factory=dict)
    num_on_the_way: int = 0  # sequences in flight
    tokens_on_the_way: int = 0

    @property
    def epoch(self) -> int:
        return self.status.worker_epoch

    @property
    def load_fraction(self) -> float:
        """Sequences held or on their way, of those that it runs at once."""
        return self.rank[0]

    def apply(self, status: WorkerStatus, scheduler: str, now: float) -> tuple[list[InFlight], list[InFlight]]:
        """Take in a newer status of the same life; returns what it shows to have arrived, and to be lost. Mutates self.

        Assignments are accepted in the order in which they were sent, so the oldest on the way are those accepted.
        """
        accepted = status.accepted.get(scheduler, 0) - self.status.accepted.get(scheduler, 0)
        arrived: list[InFlight] = []
        for flight in self.in_flight.values():
            if accepted < flight.num_choices:
                break
            accepted -= flight.num_choices
            arrived.append(flight)
        for flight in arrived:
            self.take_back(flight.key)
        lost = [flight for flight in self.in_flight.values() if now - flight.sent_at > LOST_AFTER_S]
        for flight in lost:
            self.take_back(flight.key)
        self.status = status
        self.seen_at = now
        self.is_full = False
        return arrived, lost

    def send(self, flight: InFlight, number: int) -> None:
        """Book a dispatch; `number` counts dispatches. Mutates self."""
        self.in_flight[flight.key] = flight
        self.num_on_the_way += flight.num_choices
        self.tokens_on_the_way += flight.request.num_tokens
        self.last_used = number

    def take_back(self, key: tuple[str, int]) -> InFlight | None:
        """Unbook what has arrived, or did not stay there. Mutates self."""
        flight = self.in_flight.pop(key, None)
        if flight is not None:
            self.num_on_the_way -= flight.num_choices
            self.tokens_on_the_way -= flight.request.num_tokens
        return flight

    def refresh(self, num_schedulers: int) -> None:
        """Compute room, load and rank anew, after any of the above. Mutates self."""
        status = self.status
        held = status.num_running + status.num_waiting
        self.load = held + self.num_on_the_way
        self.waiting_tokens = status.num_waiting_tokens + self.tokens_on_the_way
        self.rank = (self.load / max(1, status.max_num_seqs), self.waiting_tokens, self.last_used, self.name)
        share = -(-max(0, status.max_num_seqs - held) // num_schedulers)
        self.room = max(0, share - self.num_on_the_way) if status.state == "ready" and not self.is_full else 0

    def has_room(self, num_choices: int, num_schedulers: int) -> bool:
        """True if a request of so many choices may go there now.

        One that no share can ever hold may take of the others' shares, or it would wait for ever.
        """
        if num_choices <= self.room:
            return True
        if not self.room or num_choices <= -(-self.status.max_num_seqs // num_schedulers):
            return False
        return num_choices <= self.status.max_num_seqs - self.load
