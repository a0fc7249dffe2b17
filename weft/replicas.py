"""Which workers to start and which to end, so that there are as many as the schedulers advise. Pure.

What is in start loses nothing when it ends, so the youngest of those go first; then those that the advice names, whose
loss costs least. One that drains counts no more: it takes nothing new, and ends by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replica:
    """A worker that is there, or will be, and was not told to end."""

    name: str
    is_ready: bool
    since: float  # when it was started


@dataclass(frozen=True, slots=True)
class Change:
    """How many more to start, or which to end; nothing if both are empty."""

    num_more: int = 0
    leaving: tuple[str, ...] = ()


def plan_change(replicas: Iterable[Replica], target: int, drain: Sequence[str]) -> Change:
    """What makes it `target` workers; `drain` names ready ones, the first to go first."""
    those = list(replicas)
    if len(those) <= target:
        return Change(num_more=target - len(those))
    starting = sorted((one for one in those if not one.is_ready), key=lambda one: -one.since)
    rank = {name: index for index, name in enumerate(drain)}
    ready = sorted((one for one in those if one.is_ready), key=lambda one: (rank.get(one.name, len(rank)), -one.since))
    return Change(leaving=tuple(one.name for one in (*starting, *ready)[: len(those) - target]))
