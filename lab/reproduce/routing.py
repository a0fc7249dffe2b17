"""Where requests go: Mooncake (FAST '25), figure 5, and the hit ratio of its pool, figure 10.

Mean time to the first token of the conversation trace at several loads: random, the least loaded, prefix-aware on what
workers hold (local), and the least expected time to a first token (global). The paper's point is one load; how much
random loses depends on it wildly.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from lab.report import Figure
from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.workload import Traces, first_token_only
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Summary
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Trace, lru_hit_ratio
from scheduler_svc.policies import PolicyMaker, PolicyNames
from worker_svc.batch import Limits

NUM_REQUESTS: Final = 6_000
NUM_WORKERS: Final = 10
KV_TOKENS: Final = 3_000_000
LOADS: Final = (0.8, 1.0, 1.2)
# From the best to the worst, and how many times the best one's time to the first token the paper has.
ROUTES: Final[dict[str, float]] = {"min_ttft": 1.0, "prefix_aware": 1.17, "least_loaded": 1.72, "random": 6.4}
PAPER: Final = "Mooncake fig. 5"


def claims(traces: Traces) -> list[Claim]:
    trace = traces.conversation().first(NUM_REQUESTS)
    lines: list[Claim] = []
    for load in LOADS:
        summaries = _run(first_token_only(trace).faster(load))
        lines += _ttft_claims(
            summaries, f"first {len(trace.arrivals)} requests, {NUM_WORKERS} a800, load {load:g}x", f"{load:g}x"
        )
        if load == 1.0:
            lines += _hit_claims(trace, summaries)
    lines += _ttft_claims(_run(trace), f"the same with whole answers, {NUM_WORKERS} a800, load 1x", "1x, whole answers")
    return lines


def _run(trace: Trace) -> Mapping[str, Summary]:
    hardware = HARDWARE["a800"]
    fleet = Fleet(NUM_WORKERS, hardware.cost, Limits(256, 8192), KV_TOKENS)
    maker = PolicyMaker(random.Random(1), cost=hardware.cost)
    return {
        route: simulate(trace, Setup(fleet, PolicyNames(admit="open", route=route), maker)).summary()
        for route in ROUTES
    }


def _ttft_claims(summaries: Mapping[str, Summary], conditions: str, run: str) -> list[Claim]:
    return ordered_claims({route: summary.ttft_mean_s for route, summary in summaries.items()}, conditions, run)


def ordered_claims(ttft_s: Mapping[str, float], conditions: str, run: str) -> list[Claim]:
    """Of each route's mean time to the first token, in the order of `ROUTES`."""
    best = ttft_s["min_ttft"]
    shares = ", ".join(f"{route} {seconds:.2f} s" for route, seconds in ttft_s.items())
    in_order = sum(ttft_s[better] < ttft_s[worse] for better, worse in pairwise(ROUTES))
    figure = Figure(f"routing/{run}, order", in_order, "of 3 pairs", note=f"{conditions}: {shares}")
    lines = [Claim(PAPER, "global < local < least load < random", figure, least=3, why="two of them are as good")]
    for route, claimed in ROUTES.items():
        if route != "min_ttft":
            name = f"routing/{run}, {route} over min_ttft"
            why = "the factor grows with the load" if route == "random" else "the workers are less busy than theirs"
            lines.append(at_least(name, ratio(ttft_s[route], best), claimed, PAPER, conditions, why))
    return lines


def _hit_claims(trace: Trace, summaries: Mapping[str, Summary]) -> list[Claim]:
    """One pool of all workers' memory against what each holds itself; which router the local ones have says it all."""
    pool = lru_hit_ratio(trace, NUM_WORKERS * KV_TOKENS)
    conditions = f"first {len(trace.arrivals)} requests, {NUM_WORKERS} workers of {KV_TOKENS // 10**6}M tokens"
    lines = [shown("routing/hit ratio of one pool", pool, "of prompt tokens", conditions)]
    for route in ("least_loaded", "prefix_aware"):
        local = summaries[route].hit_ratio
        name, note = f"routing/hit ratio, pool over local with {route}", f"{conditions}: local {local:.3f}"
        why = "a router that follows prefixes finds most of what a pool would have"
        lines.append(at_least(name, ratio(pool, local), 2.22, "Mooncake fig. 10", note, why))
    return lines
