"""Who is there: membership learnt from heartbeats. Pure; every service that watches others holds one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weft.messages import HEARTBEAT_TIMEOUT_S, Heartbeat, Role, State


@dataclass(frozen=True, slots=True)
class Member:
    role: Role
    instance: str
    epoch: int
    state: State
    models: tuple[str, ...]
    last_seen: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class Change:
    """`joined`: a new life of an instance; `left`: that life is over; `changed`: state or models."""

    kind: Literal["joined", "left", "changed"]
    member: Member


class Roster:
    """The instances alive, by role and name."""

    def __init__(self, timeout_s: float = HEARTBEAT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._members: dict[tuple[Role, str], Member] = {}

    def apply(self, beat: Heartbeat, now: float) -> list[Change]:
        """Take in one heartbeat. Beats of a life already over change nothing."""
        key = (beat.role, beat.instance)
        known = self._members.get(key)
        if known and beat.epoch < known.epoch:
            return []
        if beat.state == "dead":
            return self._drop(key) if known and known.epoch == beat.epoch else []
        member = Member(beat.role, beat.instance, beat.epoch, beat.state, tuple(beat.models), now)
        self._members[key] = member
        if known is None:
            return [Change("joined", member)]
        if known.epoch != beat.epoch:
            return [Change("left", known), Change("joined", member)]
        changed = (known.state, known.models) != (member.state, member.models)
        return [Change("changed", member)] if changed else []

    def expire(self, now: float) -> list[Change]:
        """Drop whoever has been silent for longer than the timeout."""
        silent = [key for key, member in self._members.items() if now - member.last_seen > self._timeout_s]
        return [change for key in silent for change in self._drop(key)]

    def forgive(self, now: float) -> None:
        """Count silence anew: after the observer itself was cut off, or slept, absence proves nothing."""
        for key, member in self._members.items():
            self._members[key] = Member(member.role, member.instance, member.epoch, member.state, member.models, now)

    def members(self, role: Role) -> list[Member]:
        return [member for member in self._members.values() if member.role == role]

    def get(self, role: Role, instance: str) -> Member | None:
        return self._members.get((role, instance))

    def _drop(self, key: tuple[Role, str]) -> list[Change]:
        return [Change("left", self._members.pop(key))]
