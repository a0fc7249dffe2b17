"""Refusing early what would be late anyway: Mooncake (arXiv 2407.00079, section 7).

The conversation trace twice as fast as workers can bear, each request with objectives. Mooncake's baseline computes a
prompt and then refuses to decode; a Weft scheduler refuses nothing after it was admitted, so what stands for that are
answers that come late: a request has failed if it was refused or missed an objective, and the work on the prompt of
one that missed is wasted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from lab.report import Figure
from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.workload import Traces
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Slo
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Trace
from scheduler_svc.policies import PolicyMaker, PolicyNames
from scheduler_svc.policy.admit import Objectives
from worker_svc.batch import Limits

NUM_REQUESTS: Final = 3_000
NUM_WORKERS: Final = 10
KV_TOKENS: Final = 3_000_000
LOADS: Final = (1.5, 2.0)
SLO: Final = Slo(ttft_s=30.0, tbt_s=0.3)
ADMITS: Final = ("bounded", "early_reject", "predicted_reject")
# Steps short enough for the objective: with 2,048 tokens half of the requests miss it at 1x already, with 512 3 %.
CHUNK: Final = 512
# Each beside the one before it, of 23,000 requests 4,183, 3,771 and 3,589 rejected.
PAPER: Final = "Mooncake v1 section 7"
REJECTED: Final = (4183, 3771, 3589)
# Of workers that do both, the first token is what comes too late, and it is foreseen alike.
NO_DECODES: Final = "only first tokens are late here, and predictions are of decodes"


@dataclass(frozen=True, slots=True)
class Overload:
    """What became of the requests."""

    num_refused: int
    num_failed: int
    wasted_s: float  # work on prompts of requests that failed
    goodput_rps: float


def claims(traces: Traces) -> list[Claim]:
    trace = traces.conversation().first(NUM_REQUESTS)
    lines: list[Claim] = []
    for load in LOADS:
        found = {admit: overload(trace.faster(load), admit) for admit in ADMITS}
        note = f"first {len(trace.arrivals)} requests at {load:g}x, {NUM_WORKERS} a800, "
        note += f"TTFT {SLO.ttft_s:g} s, TBT {SLO.tbt_s:g} s"
        lines += compared(found, note, f"{load:g}x")
    return lines


def compared(found: Mapping[str, Overload], conditions: str, load: str) -> list[Claim]:
    """Each way to refuse against the one before it."""
    lines = []
    for (before, after), (more, fewer) in zip(pairwise(ADMITS), pairwise(REJECTED), strict=True):
        one, other, over = found[before], found[after], f"{before} over {after}"
        why = NO_DECODES if after == "predicted_reject" else "as many are too many, whoever they are"
        note = f"{conditions}: {one.num_failed} and {other.num_failed}, {other.num_refused} of them refused"
        value = ratio(one.num_failed, other.num_failed)
        lines.append(at_least(f"rejection/{load}, failed, {over}", value, more / fewer, PAPER, note, why))
        note = f"{conditions}: {one.wasted_s:.0f} and {other.wasted_s:.0f} s"
        figure = Figure(
            f"rejection/{load}, wasted prefill, {over}", ratio(one.wasted_s, other.wasted_s), "x", note=note
        )
        lines.append(Claim(PAPER, "less is computed in vain", figure, least=1.01, why=why))
        value, note = ratio(other.goodput_rps, one.goodput_rps), f"{other.goodput_rps:.2f} and {one.goodput_rps:.2f} /s"
        lines.append(shown(f"rejection/{load}, goodput, {after} over {before}", value, "x", f"{conditions}: {note}"))
    return lines


def overload(trace: Trace, admit: str) -> Overload:
    hardware = HARDWARE["a800"]
    fleet = Fleet(NUM_WORKERS, hardware.cost, Limits(64, CHUNK), KV_TOKENS)
    objectives = {"": Objectives(SLO.ttft_s, SLO.tbt_s)}
    maker = PolicyMaker(random.Random(1), cost=hardware.cost, objectives=objectives)
    result = simulate(trace, Setup(fleet, PolicyNames(admit=admit, route="min_ttft"), maker, slo=SLO))
    failed = [record for record in result.records if not SLO.holds(record)]
    summary = result.summary()
    wasted_s = sum(record.prefilled_s for record in failed)
    return Overload(summary.num_refused, len(failed), wasted_s, summary.goodput_rps)
