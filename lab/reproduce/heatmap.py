"""Prefill and decode apart where a heat map says so: DeepServe (ATC '25), section 5 and figure 8.

The map is made as theirs was: a cell for each length of prompts and share of answers, in which requests of that kind
are played on two workers that do both and on a pair that splits, at some loads; what the pair gains in time to the end,
summed over the loads. Then mixed requests go to a fleet of both kinds of workers, by the map, and to as many that do
all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Final

from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.workload import Traces, poisson
from lab.simulator.hardware import HARDWARE
from lab.simulator.kv_pool import KvSharing
from lab.simulator.record import Summary
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Trace
from scheduler_svc.policies import PolicyMaker, PolicyNames
from scheduler_svc.policy.route import Heatmap, heatmap_cell
from weft.messages import WorkerRole
from worker_svc.batch import Limits

PROMPTS: Final = (256, 512, 1024, 2048, 4096)
SHARES: Final = (1 / 64, 1 / 16, 1 / 4, 1)
# Of what two workers can compute.
LOADS: Final = (0.3, 0.6, 0.9)
NUM_OF_CELL: Final = 60
NUM_REQUESTS: Final = 1_200
RATES_RPS: Final = (4.0, 10.0, 16.0, 22.0)
PAPER: Final = "DeepServe, figure 8"
MIXED: Final[Mapping[WorkerRole, int]] = {"both": 4, "prefill": 2, "decode": 2}
WHOLE: Final[Mapping[WorkerRole, int]] = {"both": 8}
PAIR: Final[Mapping[WorkerRole, int]] = {"prefill": 1, "decode": 1}


def claims(traces: Traces) -> list[Claim]:
    heatmap, num_stable = make_heatmap()
    share = num_stable / len(heatmap)
    note = f"{len(PROMPTS)} lengths of prompts, {len(SHARES)} shares of answers, a100, loads of {LOADS}"
    lines = [at_least("heatmap/cells with one sign at all loads over .8 of them", share / 0.8, 1.0, PAPER, note)]
    lines.append(shown("heatmap/cells in which a pair gains", sum(v > 0 for v in heatmap.values()), "cells", note))
    half = NUM_REQUESTS // 2
    code, chat = (traces.azure_lengths(kind, half, 8_000) for kind in ("code", "conv"))
    lengths = [one for both in zip(code, chat, strict=False) for one in both]
    for rate in RATES_RPS:
        lines += _compared(poisson(lengths, rate), rate, heatmap)
    return lines


def _compared(trace: Trace, rate: float, heatmap: Heatmap) -> list[Claim]:
    turns = _play(trace, WHOLE, "round_robin")
    by_map = _play(trace, MIXED, "pd_heatmap", heatmap, override=math.inf)
    bound = _play(trace, MIXED, "pd_heatmap", heatmap)
    note = f"{rate:g} requests/s of Azure's code and chat in turn, 8 a100, mean time to the end: turns among 8 that do "
    note += (
        f"both {turns.e2e_mean_s:.2f} s, by the map {by_map.e2e_mean_s:.2f} s, with override {bound.e2e_mean_s:.2f} s"
    )
    gain, mended = ratio(turns.e2e_mean_s, by_map.e2e_mean_s), ratio(by_map.e2e_mean_s, bound.e2e_mean_s)
    name = f"heatmap/{rate:g}/s, turns over the map"
    is_middle = rate == RATES_RPS[1]
    first = at_least(name, gain, 1.1, PAPER, note, _WHY) if is_middle else shown(name, gain, "x", note)
    # They name the loss at high load; what mends it is ours.
    return [first, shown(f"heatmap/{rate:g}/s, the map over the map with load override", mended, "x", note)]


_WHY: Final = "four of eight workers are kept for what splits, and that gains in a quarter of the cells only"


def make_heatmap() -> tuple[Heatmap, int]:
    """The gain of a pair in each cell, summed over loads, and in how many cells its sign is the same at all loads."""
    heatmap: dict[tuple[int, int], float] = {}
    num_stable = 0
    for prompt in PROMPTS:
        for share in SHARES:
            answer = max(2, round(prompt * share))
            gains = [_gain(prompt, answer, load) for load in LOADS]
            heatmap[heatmap_cell(prompt, answer)] = sum(gains)
            num_stable += len({gain > 0 for gain in gains}) == 1
    return heatmap, num_stable


def _gain(prompt: int, answer: int, load: float) -> float:
    cost = HARDWARE["a100"].cost
    # What a request takes of a worker that decodes sixteen at once.
    seconds = cost.prefill_s(prompt) + answer * (cost.overhead_s + cost.decode_s(16, 16 * (prompt + answer))) / 16
    trace = poisson([(prompt, answer)] * NUM_OF_CELL, 2 * load / seconds)
    together, apart = _play(trace, {"both": 2}, "least_loaded"), _play(trace, PAIR, "pd_heatmap")
    return together.e2e_mean_s / apart.e2e_mean_s - 1


def _play(
    trace: Trace,
    roles: Mapping[WorkerRole, int],
    route: str,
    heatmap: Heatmap | None = None,
    *,
    override: float = 1.5,
) -> Summary:
    hardware = HARDWARE["a100"]
    sharing = KvSharing(hardware.kv_bytes_per_token, capacity_tokens=0)
    fleet = Fleet(sum(roles.values()), hardware.cost, Limits(64, 2048), hardware.kv_tokens, roles, sharing)
    maker = PolicyMaker(random.Random(1), cost=hardware.cost, heatmap=heatmap or {}, split_override=override)
    names = PolicyNames(admit="open", route=route)
    return simulate(trace, Setup(fleet, names, maker, knows_lengths=True)).summary()
