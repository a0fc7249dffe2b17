"""What a decode step costs, and what drafts add to it, from the steps' measured seconds. Pure.

Some rows more are all but free where reading weights is what takes the time, and cost in full where arithmetic does;
where the one becomes the other depends on model, machine and context. So nothing is assumed but that like steps take
about equally long. Steps are put into classes by sequences and context, and a class keeps the median of its last
measurements, which a slow step now and then does not move.

A drafted token's cost is told in tokens that are computed anyway: 1 where the step is all arithmetic, 0 where rows are
free. It is estimated for each number of drafts, one class to a doubling, starting from what holds for half as many:
the mean of that and of what was measured, each weighted by its precision.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

# Measurements that a median is taken of.
NUM_KEPT: Final = 15
# Cost of a drafted token before any was measured, and how far off that may be.
PRIOR_COST: Final = 0.2
PRIOR_DEVIATION: Final = 0.2
# How much the seconds of like steps vary, as a share of them. With half as much, one slow step at the beginning was
# believed, and a text that copies its prompt was not drafted for over hundreds of tokens.
STEP_DEVIATION: Final = 0.2
# Steps with drafts after which the plain step wants to be measured again: the contexts have grown.
MAX_DRAFTED_STEPS: Final = 64
# Steps after which a drafted token's cost is forgotten, if it was not measured again.
MAX_AGE: Final = 1024

_Key = tuple[int, int]


class _Recent:
    """The median of the last measurements."""

    __slots__ = ("measured_at", "median", "values")

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=NUM_KEPT)
        self.median = 0.0
        self.measured_at = 0  # number of the step

    def add(self, value: float, now: int) -> None:
        self.values.append(value)
        # The lower of two in the middle, as what holds steps up only makes them longer; `statistics.median` takes
        # several times as long.
        self.median = sorted(self.values)[(len(self.values) - 1) // 2]
        self.measured_at = now


@dataclass(slots=True)
class _Class:
    """Like steps."""

    plain: _Recent = field(default_factory=_Recent)  # seconds without drafts
    costs: dict[int, _Recent] = field(default_factory=dict)  # of a drafted token, by class of their number
    num_drafted_steps: int = 0  # since the last plain one


class StepCost:
    """Seconds of decode steps, learned from them. A step is named by its sequences and the tokens they attend to."""

    def __init__(self) -> None:
        self._classes: dict[_Key, _Class] = {}
        self._last = _Class()  # the last in which drafts were measured
        self._num_steps = 0
        # What `token_costs` said since a draft was measured.
        self._known_costs: dict[tuple[_Key, int], list[float]] = {}

    def observe(self, num_sequences: int, num_context: int, num_drafts: int, seconds: float) -> None:
        """Learn from a step that computed one token of each sequence and `num_drafts` drafted ones."""
        self._num_steps += 1
        if num_drafts or self._num_steps % MAX_AGE == 0:
            self._known_costs.clear()
        steps = self._classes.setdefault(_key(num_sequences, num_context), _Class())
        if not num_drafts:
            steps.plain.add(seconds, self._num_steps)
            steps.num_drafted_steps = 0
            return
        steps.num_drafted_steps += 1
        if steps.plain.values:
            cost = (seconds / steps.plain.median - 1) * num_sequences / num_drafts
            steps.costs.setdefault(_draft_class(num_drafts), _Recent()).add(cost, self._num_steps)
            self._last = steps

    def plain_seconds(self, num_sequences: int, num_context: int) -> float | None:
        """Of a step without drafts. None: it was never measured, or not since many steps with drafts."""
        steps = self._classes.get(_key(num_sequences, num_context))
        if steps is None or not steps.plain.values or steps.num_drafted_steps >= MAX_DRAFTED_STEPS:
            return None
        return steps.plain.median

    def token_costs(self, num_sequences: int, num_context: int, max_drafts: int) -> list[float]:
        """Cost of a drafted token, by class of their number, up to that of `max_drafts`; see `shares`."""
        key = (_key(num_sequences, num_context), _draft_class(max_drafts))
        if key not in self._known_costs:
            # One number of sequences stands for the others of its class.
            self._known_costs[key] = self._estimate_costs(*key, num_sequences)
        return self._known_costs[key]

    def _estimate_costs(self, key: _Key, last_class: int, num_sequences: int) -> list[float]:
        steps = self._classes.get(key, self._last)
        if not steps.costs:
            # As it was in other steps, until it is known here.
            steps = self._last
        costs: list[float] = []
        cost = PRIOR_COST
        for draft_class in range(last_class + 1):
            cost = self._estimate(steps.costs.get(draft_class), 2**draft_class / num_sequences, cost)
            costs.append(max(cost, 0.0))
        return costs

    def _estimate(self, measured: _Recent | None, drafts_per_sequence: float, prior: float) -> float:
        if measured is None or measured.measured_at < self._num_steps - MAX_AGE:
            return prior
        weight = len(measured.values) * (drafts_per_sequence / STEP_DEVIATION) ** 2
        prior_weight = PRIOR_DEVIATION**-2
        return (weight * measured.median + prior_weight * prior) / (weight + prior_weight)


class RoundCost:
    """Seconds of a draft model's forward pass by its tokens, learned from them."""

    def __init__(self) -> None:
        self._classes: dict[int, _Recent] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._classes.setdefault(_size_class(num_tokens), _Recent()).add(seconds, 0)

    def seconds(self, num_tokens: int) -> float:
        """As of the nearest number of tokens that was measured; 0 before any was."""
        size = _size_class(num_tokens)
        nearest = min(self._classes, key=lambda other: abs(other - size), default=None)
        return 0.0 if nearest is None else self._classes[nearest].median


def shares(token_costs: list[float], num_sequences: int, max_drafts: int) -> list[float]:
    """What 0, 1, ... `max_drafts` drafted tokens add to a step, as shares of the plain one."""
    added = [0.0]
    for draft_class in range(_draft_class(max_drafts) + 1):
        share = token_costs[draft_class] / num_sequences
        added += [share * count for count in range(len(added), min(2**draft_class, max_drafts) + 1)]
    return added


def _key(num_sequences: int, num_context: int) -> _Key:
    """By sequences, and of context one class to a doubling."""
    return _size_class(num_sequences), num_context.bit_length()


def _size_class(count: int) -> int:
    """Each number up to sixteen is a class of its own, then eight to a doubling."""
    return count if count <= 16 else 16 + round(8 * math.log2(count / 16))


def _draft_class(num_drafts: int) -> int:
    """One class to a doubling: 1, 2, 3 and 4, 5 to 8, ..."""
    return (num_drafts - 1).bit_length()
