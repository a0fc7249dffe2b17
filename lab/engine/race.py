"""Running rivals in turn, and what came of it as figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from lab.report import Figure, median_figure, say

Times = Mapping[str, list[float]]


def race(
    variants: Mapping[str, Callable[[], object]], rounds: int = 9, *, is_warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each round of each variant; the order turns round, since each finds what the one before left.

    `is_warm`: no variant has anything left to do once; else each has a round more, which is not counted.
    """
    for variant in () if is_warm else variants.values():
        variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            variants[name]()
            times[name].append(time.perf_counter() - started)
    return times


def rivals(what: str, times: Times, chosen: str, bar: float | None = 1.0) -> list[Figure]:
    """How many times as long each rival took as what was chosen."""
    figures = []
    for name, seconds in times.items():
        if name == chosen:
            continue
        ratios = [rival / own for rival, own in zip(seconds, times[chosen], strict=True)]
        both = f"{_ms(times[chosen])} and {_ms(seconds)} ms"
        figures.append(median_figure(f"{what}: {chosen} before {name}", ratios, "x", bar=bar, side="least", note=both))
        say(f"  {figures[-1].line()}")
    return figures


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g}"
