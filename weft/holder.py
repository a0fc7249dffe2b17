"""What all who hold requests for a while (tokenizer, scheduler, worker) owe the gateways alike. Pure.

They claim what they hold, remember cancels that overtook their request, and let go of what belongs to a gateway that
is not there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

from weft.columns import pack_u32
from weft.messages import HEARTBEAT_TIMEOUT_S, Claims, Role
from weft.roster import Roster

MAX_REMEMBERED_CANCELS: Final = 16_384
# A gateway that no heartbeat was ever heard of is given this long.
MISSING_GATEWAY_S: Final = 2 * HEARTBEAT_TIMEOUT_S


class Held(Protocol):
    """A request as its holder keeps it."""

    @property
    def request_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...

    @property
    def gateway(self) -> str: ...


H = TypeVar("H", bound=Held)


def by_gateway(held: Iterable[H]) -> dict[str, list[H]]:
    """The requests of each gateway, in the order given."""
    groups: dict[str, list[H]] = {}
    for request in held:
        groups.setdefault(request.gateway, []).append(request)
    return groups


def make_claims(role: Role, instance: str, held: Iterable[Held]) -> list[tuple[str, Claims]]:
    """(gateway, claims) pairs over all that is held."""
    return [
        (gateway, Claims(role, instance, [r.request_id for r in requests], pack_u32([r.epoch for r in requests])))
        for gateway, requests in by_gateway(held).items()
    ]


class Cancelled:
    """The highest epoch cancelled of each request, for the last so many: a cancel may overtake what it is about."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED_CANCELS) -> None:
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._max_remembered = max_remembered

    def remember(self, request_id: str, epoch: int) -> None:
        self._epochs[request_id] = max(epoch, self._epochs.pop(request_id, epoch))
        while len(self._epochs) > self._max_remembered:
            self._epochs.popitem(last=False)

    def covers(self, request_id: str, epoch: int) -> bool:
        return self._epochs.get(request_id, -1) >= epoch


class MissingGateways:
    """Gateways that requests name but nobody hears: one that died before we came never leaves the roster."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._since: dict[str, float] = {}

    def find(self, named: Iterable[str], now: float) -> list[str]:
        """Those of the named that have been missing for too long. Mutates self; call it regularly."""
        missing = {gateway for gateway in named if self._roster.get("gateway", gateway) is None}
        self._since = {gateway: self._since.get(gateway, now) for gateway in missing}
        return [gateway for gateway, since in self._since.items() if now - since > MISSING_GATEWAY_S]

    def forgive(self) -> None:
        """Count anew: while we could not hear, absence proved nothing."""
        self._since.clear()
