"""Which requests a worker has taken, at which epoch, and which it must not take any more. Pure.

A request is held from its assignment until its last choice ends. Of an id only the highest epoch is held: taking
one ends those below. Cancels are remembered for a while, since a Cancel may overtake the assignment it is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from weft.errors import InvariantViolation
from weft.holder import Cancelled
from weft.messages import TokenizedRequest


@dataclass(slots=True)
class HeldRequest:
    request_id: str
    epoch: int
    gateway: str
    slots: set[int]  # of the choices that have not ended
    stamps: Mapping[str, float]
    tenant: str = ""
    num_prompt_tokens: int = 0


class HeldTable:
    """The requests held, and the cancels remembered."""

    def __init__(self) -> None:
        self._held: dict[str, HeldRequest] = {}
        self._cancelled = Cancelled()
        self.num_sequences = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[HeldRequest]:
        return iter(list(self._held.values()))

    def get(self, request_id: str, epoch: int) -> HeldRequest | None:
        held = self._held.get(request_id)
        return held if held is not None and held.epoch == epoch else None

    def is_stale(self, request_id: str, epoch: int) -> bool:
        """True if this epoch was cancelled, or it or a higher one is held."""
        held = self._held.get(request_id)
        return (held is not None and held.epoch >= epoch) or self._cancelled.covers(request_id, epoch)

    def take(self, request: TokenizedRequest, stamps: Mapping[str, float]) -> None:
        """Hold a request, which must not be stale, and whose lower epochs have been cancelled."""
        self._held[request.request_id] = HeldRequest(
            request.request_id,
            request.epoch,
            request.gateway,
            {choice.slot for choice in request.choices},
            stamps,
            request.tenant,
            request.num_prompt_tokens,
        )
        self.num_sequences += len(request.choices)

    def cancel(self, request_id: str, epoch: int, slots: Iterable[int] = ()) -> bool:
        """Let go of a request at `epoch` and below, or of some of its choices; True if any was held."""
        chosen = set(slots)
        if not chosen:
            self._cancelled.remember(request_id, epoch)
        held = self._held.get(request_id)
        if held is None or held.epoch > epoch:
            return False
        return self._let_go(held, held.slots & chosen if chosen else set(held.slots))

    def finish(self, request_id: str, epoch: int, slot: int) -> None:
        """One choice has ended; of a request that is not held, nothing."""
        held = self.get(request_id, epoch)
        if held is not None:
            self._let_go(held, held.slots & {slot})

    def end(self, request_id: str, epoch: int) -> None:
        """All choices have ended."""
        held = self.get(request_id, epoch)
        if held is not None:
            self._let_go(held, set(held.slots))

    def of_gateway(self, gateway: str) -> list[HeldRequest]:
        return [held for held in self._held.values() if held.gateway == gateway]

    def check(self) -> None:
        """Raises InvariantViolation if the count of sequences is not that of the requests held."""
        counted = sum(len(held.slots) for held in self._held.values())
        if counted != self.num_sequences or any(not held.slots for held in self._held.values()):
            raise InvariantViolation(f"{self.num_sequences} sequences counted, {counted} held")

    def _let_go(self, held: HeldRequest, slots: set[int]) -> bool:
        held.slots -= slots
        self.num_sequences -= len(slots)
        if not held.slots:
            del self._held[held.request_id]
        return bool(slots)
