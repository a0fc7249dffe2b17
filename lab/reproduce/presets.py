"""Weft's preset beside the four others over loads of every trace, and what each of its policies gains.

Goodput is good requests in a second of the time in which requests came, so that at one load presets differ as their
shares of good requests do. All play the same requests on the same workers. What makes a request good was published
for traces of its kind: a time to the first token, and one between tokens, the mean of a request's longest tenth.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from lab.report import Figure
from lab.reproduce.claim import Claim, ratio, shown
from lab.reproduce.workload import Traces
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Slo
from lab.simulator.report import number
from lab.simulator.sweep import Case, Knobs, make_setup, play_all
from weft.messages import WorkerRole
from weft.presets import PRESETS

Key = TypeVar("Key")
OURS: Final = "weft"
# Share of good requests at a load that is borne.
ENOUGH: Final = 0.9
# Of a load that is not borne to one that is, where the search between them ends.
NEAR: Final = 1.05
MLPERF: Final = "MLPerf's for Llama 2 70B"


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace, what makes its requests good, and loads from one that most bear to one that nobody does."""

    name: str
    file: str
    slo: Slo
    slo_source: str
    loads: tuple[float, ...]


CONVERSATION: Final = Workload(
    "conversation",
    "mooncake_conversation_trace.jsonl.xz",
    Slo(30.0, 0.2),
    "Mooncake's, of three times between tokens the middle one",
    (0.5, 1.0, 2.0, 4.0),
)
WORKLOADS: Final[Sequence[Workload]] = (
    CONVERSATION,
    Workload("Azure conv", "azure_llm_2023_conv.csv", Slo(2.0, 0.2), MLPERF, (2.0, 4.0, 8.0, 16.0)),
    Workload("Azure code", "azure_llm_2023_code.csv", Slo(2.0, 0.2), MLPERF, (0.5, 1.0, 2.0, 4.0)),
    Workload("ServeGen", "servegen_language_m-small.tar.xz", Slo(2.0, 0.2), MLPERF, (16.0, 32.0, 64.0, 128.0)),
    Workload(
        "arxiv",
        "vidur_arxiv_summarization_lengths.csv",
        Slo(15.0, 0.15),
        "DistServe's for summaries by OPT-66B",
        (0.5, 1.0, 2.0, 4.0),
    ),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is played."""

    num_requests: int = 1_000
    num_workers: int = 8
    num_rounds: int = 6  # of the search for loads that are borne
    num_processes: int = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Variant:
    """A preset with changes, by the names of `Knobs`."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)


AS_THEY_ARE: Final = {name: Variant(name) for name in PRESETS}
# Past what workers can do everybody is late who refuses nobody, which would be all that is compared.
REFUSING: Final = {
    name: Variant(name, {"policies": {"admit": "predicted_reject"}})
    for name, preset in PRESETS.items()
    if preset.admit == "open"
}
_HALVES: Final[Mapping[WorkerRole, int]] = {"prefill": 4, "decode": 4}
# One change each; the last one is what suits these workers, where the preset's own steps suit a CPU.
CHANGED: Final[Mapping[str, Variant]] = {
    "admit=open": Variant(OURS, {"policies": {"admit": "open"}}),
    "route=least_loaded": Variant(OURS, {"policies": {"route": "least_loaded"}}),
    "route=prefix_aware": Variant(OURS, {"policies": {"route": "prefix_aware"}}),
    "steps of 2,048 tokens": Variant(OURS, {"max_num_batched_tokens": 2048}),
    "prefill and decode apart": Variant(OURS, {"policies": {"route": "min_ttft"}, "roles": _HALVES}),
    "steps of 512 tokens and 256 sequences": Variant(OURS, {"max_num_batched_tokens": 512, "max_num_seqs": 256}),
}

Shares = Mapping[str, float]  # of good requests, by what was played
Point = tuple[Workload, float]  # at this load
Play = tuple[Workload, Variant, float]


def claims(traces: Traces, sizes: Sizes | None = None) -> list[Claim]:
    workloads = WORKLOADS
    if traces.instead is not None:
        workloads = (replace(CONVERSATION, name=traces.instead.name.partition(".")[0]),)
    stage = Stage(traces, workloads, sizes or Sizes())
    points = [(workload, load) for workload in workloads for load in workload.loads]
    swept = stage.sweep(points, AS_THEY_ARE)
    borne = stage.search(swept)
    lines = []
    for workload in workloads:
        lines += [beaten(workload, load, swept[workload, load], stage.told(workload, load)) for load in workload.loads]
        lines.append(outlasted(workload, {name: borne[workload, name] for name in PRESETS}, stage.told(workload)))
    # At the lightest one hardly anybody would refuse anything.
    lines += _fair(stage, [(workload, load) for workload in workloads for load in workload.loads[1:]], swept)
    return [*lines, *_changed(stage, [(workload, workload.loads[2]) for workload in workloads[:2]], swept)]


class Stage:
    """Where variants play workloads."""

    def __init__(self, traces: Traces, workloads: Sequence[Workload], sizes: Sizes) -> None:
        self._sizes = sizes
        self._traces = {workload: traces.first(workload.file, sizes.num_requests) for workload in workloads}

    def shares(self, plays: Sequence[Play]) -> list[float]:
        """Of good requests."""
        cases = [self._case(*play) for play in plays]
        return [row.summary.share_good for row in play_all(cases, self._sizes.num_processes, lambda ended, row: None)]

    def sweep(self, points: Sequence[Point], variants: Mapping[str, Variant]) -> dict[Point, Shares]:
        """Every variant at every load."""
        plays = [(workload, variant, load) for workload, load in points for variant in variants.values()]
        shares = iter(self.shares(plays))
        return {point: {name: next(shares) for name in variants} for point in points}

    def search(self, swept: Mapping[Point, Shares]) -> dict[tuple[Workload, str], float]:
        """The highest load at which a preset has enough good requests."""
        brackets = {
            (workload, name): bracket({load: swept[workload, load][name] for load in workload.loads})
            for workload in self._traces
            for name in PRESETS
        }

        def are_borne(tried: Sequence[tuple[tuple[Workload, str], float]]) -> list[bool]:
            plays = [(workload, AS_THEY_ARE[name], load) for (workload, name), load in tried]
            return [share >= ENOUGH for share in self.shares(plays)]

        return {key: found.low for key, found in narrowed(brackets, are_borne, self._sizes.num_rounds).items()}

    def told(self, workload: Workload, load: float | None = None) -> str:
        """Conditions."""
        trace, slo = self._traces[workload], workload.slo
        at = "" if load is None else f" at {load:g}x, {number(load * trace.rate_rps)}/s"
        return (
            f"first {len(trace.arrivals)} requests{at}, {self._sizes.num_workers} a800, good: TTFT {slo.ttft_s:g} s, "
            f"TBT {slo.tbt_s:g} s ({workload.slo_source})"
        )

    def _case(self, workload: Workload, variant: Variant, load: float) -> Case:
        trace = self._traces[workload]
        knobs = Knobs(HARDWARE["a800"], workload.slo, **variant.changes)
        setup = make_setup(trace, PRESETS[variant.preset], self._sizes.num_workers, knobs)
        return Case(trace, variant.preset, load, setup)


# ---- verdicts ----


def beaten(workload: Workload, load: float, shares: Shares, conditions: str, figure: str = "goodput") -> Claim:
    """Ours against the best of the others."""
    name, best = f"presets/{workload.name}, {load:g}x, {figure}, {OURS} over the best other", _best(shares)
    note = f"{conditions}: {_listed(shares, _percent)}"
    return _claim(Figure(name, ratio(shares[OURS], shares[best]), "x", note=note), best, _percent(shares[best]))


def outlasted(workload: Workload, loads: Mapping[str, float], conditions: str) -> Claim:
    """The same of the highest loads that are borne."""
    name = f"presets/{workload.name}, load at which {100 * ENOUGH:g} % are good, {OURS} over the best other"
    best, note = _best(loads), f"{conditions}: {_listed(loads, _times)}"
    return _claim(Figure(name, ratio(loads[OURS], loads[best]), "x", note=note), best, _times(loads[best]))


def _claim(figure: Figure, best: str, value: str) -> Claim:
    least = math.nextafter(1.0, 2.0)
    if_not = "as good" if figure.value == 1.0 else "does not beat each"
    if_so, why = f"beats each, {best} by least", f"{best} has {value}"
    return Claim("Weft", "more than each of the four", figure, least=least, why=why, if_so=if_so, if_not=if_not)


def _fair(stage: Stage, points: Sequence[Point], swept: Mapping[Point, Shares]) -> list[Claim]:
    """Ours against the others, all of which refuse what they expect to be late."""
    lines = []
    for (workload, load), shares in stage.sweep(points, REFUSING).items():
        every = {**swept[workload, load], **shares}
        lines.append(beaten(workload, load, every, stage.told(workload, load), "goodput where all refuse"))
    return lines


def _changed(stage: Stage, points: Sequence[Point], swept: Mapping[Point, Shares]) -> list[Claim]:
    """What is left of ours with one change."""
    lines = []
    for (workload, load), shares in stage.sweep(points, CHANGED).items():
        ours = swept[workload, load][OURS]
        for change, share in shares.items():
            note = f"{stage.told(workload, load)}: {_percent(share)} and {_percent(ours)}"
            name = f"presets/ablation, {workload.name}, {load:g}x, goodput, {OURS} with {change} over {OURS}"
            lines.append(shown(name, ratio(share, ours), "x", note))
    return lines


def _best(values: Mapping[str, float]) -> str:
    return max((name for name in values if name != OURS), key=values.__getitem__)


def _listed(values: Mapping[str, float], show: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _times(load: float) -> str:
    return f"{load:.3g}x"


# ---- the highest load ----


@dataclass(frozen=True, slots=True)
class Bracket:
    """A load that is borne, 0 if none is known, and one that is not, infinite if none is known."""

    low: float
    high: float

    @property
    def is_narrow(self) -> bool:
        return self.high <= NEAR * self.low

    @property
    def middle(self) -> float:
        """What to try next."""
        if math.isinf(self.high):
            return 2 * self.low
        return math.sqrt(self.low * self.high) if self.low else self.high / 2

    def tried(self, load: float, is_borne: bool) -> Bracket:
        return replace(self, low=load) if is_borne else replace(self, high=load)


def bracket(shares: Mapping[float, float]) -> Bracket:
    """Of shares of good requests by load, in the order of the loads: up to the first that is not enough."""
    low = 0.0
    for load, share in shares.items():
        if share < ENOUGH:
            return Bracket(low, load)
        low = load
    return Bracket(low, math.inf)


def narrowed(
    brackets: Mapping[Key, Bracket],
    are_borne: Callable[[Sequence[tuple[Key, float]]], Sequence[bool]],
    num_rounds: int,
) -> dict[Key, Bracket]:
    """Each as narrow as so many trials make it; a round tries one load of each at once."""
    found = dict(brackets)
    for _ in range(num_rounds):
        tried = [(key, one.middle) for key, one in found.items() if not one.is_narrow]
        for (key, load), is_borne in zip(tried, are_borne(tried) if tried else (), strict=True):
            found[key] = found[key].tried(load, is_borne)
    return found
