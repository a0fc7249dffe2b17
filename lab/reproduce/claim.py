"""What a source claims beside what was measured, and what follows from the two. Pure.

Every figure is turned so that more of it speaks for the claim: ratios of the baseline to what is praised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lab.report import Figure


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of the table. The figure's note says under which conditions it was measured."""

    source: str
    claimed: str  # as the source says it; nothing if nobody claims anything
    measured: Figure
    least: float = -math.inf  # from here on it reproduces
    most: float = math.inf
    sign: float = math.inf  # beyond this it points the same way at least
    why: str = ""  # what makes the difference, where there is one
    if_so: str = "reproduces"
    if_not: str = "does not reproduce"

    @property
    def is_reproduced(self) -> bool:
        return self.least <= self.measured.value <= self.most

    @property
    def verdict(self) -> str:
        """What follows from the figure alone."""
        if not self.claimed:
            return "no claim"
        if self.is_reproduced:
            return self.if_so
        found = "same sign, smaller" if self.sign < self.measured.value < self.least else self.if_not
        return f"{found}: {self.why}" if self.why else found

    def line(self) -> str:
        figure = self.measured
        claimed = f"{self.source}: {self.claimed}" if self.claimed else "-"
        value = f"{figure.value:.4g} {figure.unit}".rstrip()
        return f"{figure.name} | {claimed} | measured {value} | {figure.note or '-'} | {self.verdict}"

    def row(self) -> Mapping[str, Any]:
        """The line for a JSON file, which knows no infinity."""
        return {
            "name": self.measured.name,
            "source": self.source,
            "claimed": self.claimed,
            "measured": self.measured.value if math.isfinite(self.measured.value) else None,
            "unit": self.measured.unit,
            "conditions": self.measured.note,
            "verdict": self.verdict,
        }


def at_least(name: str, value: float, claimed: float, source: str, conditions: str, why: str = "") -> Claim:
    """A factor that is claimed: nine tenths of the gain reproduce it, and any gain at all points the same way."""
    figure = Figure(name, value, "x", note=conditions)
    return Claim(source, f"{claimed:.3g}x", figure, least=1 + 0.9 * (claimed - 1), sign=1.0, why=why)


def shown(name: str, value: float, unit: str, conditions: str) -> Claim:
    """A figure that belongs to a claim and is none itself."""
    return Claim("", "", Figure(name, value, unit, note=conditions))


def ratio(before: float, after: float) -> float:
    """How many times as much; without bound if nothing is left."""
    if after:
        return before / after
    return math.inf if before else 1.0
