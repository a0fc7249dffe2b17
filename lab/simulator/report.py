"""The figures of a sweep's runs, as a table of text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from lab.simulator.record import Slo
from lab.simulator.sweep import Row


@dataclass(frozen=True, slots=True)
class Heading:
    """What all runs have in common."""

    title: str
    hardware: str
    slo: Slo
    command: str

    @property
    def promise(self) -> str:
        """What makes a request a good one."""
        parts = []
        if math.isfinite(self.slo.ttft_s):
            parts.append(f"its first token comes within {self.slo.ttft_s:g} s")
        if math.isfinite(self.slo.tbt_s):
            parts.append(f"its longest tenth of gaps between tokens is at most {self.slo.tbt_s:g} s on average")
        return "a request is good if " + (" and ".join(parts) or "it ends")


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a run."""

    head: str  # of its column
    unit: str  # nothing for shares
    of: Callable[[Row], float]

    def show(self, value: float) -> str:
        if not math.isfinite(value):
            return "-"
        return number(value) if self.unit else f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Three digits, and no more than three behind the point."""
    if not math.isfinite(value):
        # Of nothing: no request ended.
        return "-"
    if abs(value) < 0.0005:
        return "0"
    return f"{value:,.{min(3, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


MEASURES: Final[dict[str, Measure]] = {
    "ttft_mean": Measure("ttft mean", "s", lambda row: row.summary.ttft_mean_s),
    "ttft_p50": Measure("p50", "s", lambda row: row.summary.ttft_p50_s),
    "ttft_p90": Measure("p90", "s", lambda row: row.summary.ttft_p90_s),
    "ttft_p99": Measure("p99", "s", lambda row: row.summary.ttft_p99_s),
    "tbt_p50": Measure("tbt p50", "s", lambda row: row.summary.tbt_p50_s),
    "tbt_p99": Measure("p99", "s", lambda row: row.summary.tbt_p99_s),
    "goodput": Measure("good/s", "1/s", lambda row: row.summary.goodput_rps),
    "good": Measure("good", "", lambda row: row.summary.share_good),
    "hits": Measure("hits", "", lambda row: row.summary.hit_ratio),
    "refused": Measure("refused", "", lambda row: row.summary.num_refused / max(1, row.summary.num_requests)),
    "wasted": Measure("wasted", "s", lambda row: row.summary.wasted_prefill_s),
    "busy": Measure("busy", "", lambda row: row.summary.utilization),
    "cost": Measure("cost", "s", lambda row: row.summary.cost_worker_s),
}
# What the heads of columns mean.
LEGEND: Final = (
    "ttft, tbt: times to the first token and between tokens, in s; good/s: good requests in a second of the time in",
    "which requests came, whenever the run ended; hits: prompt tokens that were cached;",
    "wasted: seconds of prefill of requests that were refused after it; busy: time in which workers computed;",
    "cost: worker-seconds for 1,000 good requests",
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The heads of the columns, and a list for each row. The first two columns are names."""
    found = [["trace", "preset", "load", "req/s", *(measure.head for measure in MEASURES.values())]]
    for row in rows:
        names = [row.trace, row.preset, f"{row.load:g}", number(row.offered_rps)]
        found.append(names + [measure.show(measure.of(row)) for measure in MEASURES.values()])
    return found


def table(heading: Heading, rows: Sequence[Row]) -> str:
    """One line a row, under what was asked."""
    lines = cells(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        figures = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        texts.append("  ".join(names + figures).rstrip())
    return "\n".join([f"{heading.title}, each {heading.hardware}", heading.promise, "", *texts, "", *LEGEND, ""])


def to_json(heading: Heading, rows: Sequence[Row]) -> bytes:
    """What was asked, and every figure of every run; null where there is none."""
    return msgspec.json.format(msgspec.json.encode({"asked": heading, "runs": rows}), indent=2) + b"\n"
