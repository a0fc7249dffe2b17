"""Prompts in chunks beside decodes: Sarathi-Serve (Agrawal et al. 2024, OSDI), figures 1, 10 and 11.

The longest gaps between tokens, and the most requests a second at which the 99th percentile of the gaps keeps an
objective while first tokens do not queue, for whole prompts before decodes (vLLM before version 1), whole prompts
beside decodes (Orca) and prompts in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.workload import Lengths, Traces, poisson
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Record, quantile
from lab.simulator.simulation import Fleet, Setup, simulate
from scheduler_svc.policies import PolicyNames
from worker_svc.batch import Limits

NUM_REQUESTS: Final = 200
MAX_TOKENS: Final = 8_192
# Tokens of a step, and seconds from token to token that are promised.
CHUNK: Final = 512
TBT_S: Final = 0.2
# First tokens may wait so long in the median, beyond which a rate is not sustained (section 5.1).
QUEUE_S: Final = 2.0
# Rates that are tried, each a fourth more than the one before.
RATES_RPS: Final = tuple(0.1 * 1.25**i for i in range(24))
BATCHES: Final = ("chunked", "prefill_first", "continuous")
PAPER: Final = "Sarathi-Serve"


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of one run."""

    p99_s: float
    ttft_p50_s: float


def claims(traces: Traces) -> list[Claim]:
    workloads = {
        "code": traces.azure_lengths("code", NUM_REQUESTS, MAX_TOKENS),
        "arxiv": traces.arxiv_lengths(NUM_REQUESTS, MAX_TOKENS),
    }
    lines: list[Claim] = []
    for name, lengths in workloads.items():
        capacity = {batch: capacity_rps(lengths, batch) for batch in BATCHES}
        rate_rps = max(capacity["chunked"], RATES_RPS[0])
        gaps = {batch: played(lengths, batch, rate_rps) for batch in BATCHES}
        lines += compared(name, gaps, capacity, f"first {len(lengths)} {name} lengths, a100 (OPT-13B)", rate_rps)
    return lines


def compared(
    workload: str, gaps: Mapping[str, Gaps], capacity: Mapping[str, float], conditions: str, rate_rps: float
) -> list[Claim]:
    """Other ways of batching against chunks."""
    lines = []
    for batch in ("prefill_first", "continuous"):
        name = f"chunked/{workload}, p99 gap, {batch} over chunked"
        note = f"{conditions}, {rate_rps:.2f} requests/s, chunks of {CHUNK}: "
        note += f"{gaps[batch].p99_s:.3f} and {gaps['chunked'].p99_s:.3f} s"
        lines.append(shown(name, ratio(gaps[batch].p99_s, gaps["chunked"].p99_s), "x", note))
        name = f"chunked/{workload}, capacity, chunked over {batch}"
        note = f"{conditions}, p99 gap of {TBT_S} s, median first token in {QUEUE_S:g} s of queue: "
        note += f"{capacity['chunked']:.2f} and {capacity[batch]:.2f} requests/s"
        value = ratio(capacity["chunked"], capacity[batch])
        why = "its factor is for a smaller model and a tighter objective"
        lines.append(at_least(name, value, 2.6, f"{PAPER} (Mistral-7B)", note, why))
    return lines


def capacity_rps(lengths: Lengths, batch: str) -> float:
    """The highest of `RATES_RPS` before one that does not keep the objective; 0 if the first does not."""
    kept = 0.0
    for rate_rps in RATES_RPS:
        found = played(lengths, batch, rate_rps)
        if found.p99_s > TBT_S or found.ttft_p50_s > QUEUE_S + _alone_s(lengths):
            break
        kept = rate_rps
    return kept


def played(lengths: Lengths, batch: str, rate_rps: float) -> Gaps:
    hardware = HARDWARE["a100"]
    fleet = Fleet(1, hardware.cost, Limits(128, CHUNK, batch), hardware.kv_tokens)
    result = simulate(poisson(lengths, rate_rps), Setup(fleet, PolicyNames(admit="open")))
    return Gaps(p99_gap_s(result.records), result.summary().ttft_p50_s)


def p99_gap_s(records: Sequence[Record]) -> float:
    """Of all gaps of all requests."""
    gaps = sorted((gap for record in records for gap in record.gaps), reverse=True)
    left = 0.01 * sum(count for _, count in gaps)
    for gap_s, count in gaps:
        left -= count
        if left <= 0:
            return gap_s
    return 0.0


def _alone_s(lengths: Lengths) -> float:
    """Of the median prompt, with nothing else to do."""
    cost = HARDWARE["a100"].cost
    return cost.overhead_s + cost.prefill_s(int(quantile(sorted(prompt for prompt, _ in lengths), 0.5)))
