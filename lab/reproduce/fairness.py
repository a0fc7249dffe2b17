"""Service of two tenants of which one floods: VTC (Sheng et al. 2024, OSDI).

Service is tokens of prompts and twice the tokens of answers that were computed. First come, first served gives the
flooding tenant more and more of it; fair order keeps the difference within a bound while both wait all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lab.report import Figure
from lab.reproduce.claim import Claim, ratio, shown
from lab.reproduce.workload import Traces, merged, of_tenant, poisson
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Record, mean
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Trace
from scheduler_svc.policies import PolicyNames
from scheduler_svc.policy.order import OUTPUT_WEIGHT
from worker_svc.batch import Limits

PROMPT: Final = 256
ANSWER: Final = 256
MAX_NUM_SEQS: Final = 32
# Requests a second: one a100 serves about 2.4 of these, so each is beyond half of it.
STEADY_RPS: Final = 2.0
FLOOD_RPS: Final = 6.0
DURATION_S: Final = 240.0
PAPER: Final = "VTC"
CONDITIONS: Final = (
    f"one a100 (OPT-13B), {PROMPT} + {ANSWER} tokens, {STEADY_RPS:g} and {FLOOD_RPS:g} requests/s, "
    f"first {DURATION_S:g} s of service"
)


def claims(traces: Traces) -> list[Claim]:
    """All made up: no public trace has tenants."""
    differences = {order: differences_of(played(order)) for order in ("fcfs", "fair")}
    return [*compared(differences), *_light_claims()]


def compared(differences: dict[str, list[float]]) -> list[Claim]:
    """Service differences over time, at equal distances."""
    fcfs, fair = differences["fcfs"], differences["fair"]
    bound = service_bound()
    most = max(map(abs, fair))
    within = Figure("fairness/bound over difference, fair", ratio(bound, most), "x", note=f"{CONDITIONS}: {most:.0f}")
    growth = ratio(mean(fcfs[-5:]), mean(fcfs[len(fcfs) // 2 - 5 : len(fcfs) // 2]))
    grows = Figure("fairness/difference at the end over that at half time, fcfs", growth, "x", note=CONDITIONS)
    return [
        Claim(f"{PAPER}'s bound", f"at most 2 max(prompt, 2 batch) = {bound:.0f}", within, least=1.0),
        Claim(PAPER, "grows without bound", grows, least=1.5, sign=1.0, why="the flood is too short"),
        shown("fairness/difference, fcfs over fair", ratio(max(map(abs, fcfs)), most), "x", CONDITIONS),
    ]


def service_bound() -> float:
    """Of two tenants that wait all the time, in weighted tokens."""
    return 2 * max(PROMPT, OUTPUT_WEIGHT * MAX_NUM_SEQS * (PROMPT + ANSWER))


def workload(steady_rps: float) -> Trace:
    """A tenant that asks steadily, and one that floods."""
    rates = {"steady": steady_rps, "flood": FLOOD_RPS}
    return merged(
        of_tenant(poisson([(PROMPT, ANSWER)] * round(rate * DURATION_S), rate, seed), tenant)
        for seed, (tenant, rate) in enumerate(rates.items(), 1)
    )


def played(order: str, steady_rps: float = STEADY_RPS) -> list[Record]:
    hardware = HARDWARE["a100"]
    fleet = Fleet(1, hardware.cost, Limits(MAX_NUM_SEQS, 2048), hardware.kv_tokens)
    return simulate(workload(steady_rps), Setup(fleet, PolicyNames(admit="open", order=order))).records


def differences_of(records: Sequence[Record], num_moments: int = 60) -> list[float]:
    """Service of the flooding tenant less that of the other until each moment."""
    moments = [DURATION_S * (i + 1) / num_moments for i in range(num_moments)]
    signs = {"flood": 1.0, "steady": -1.0}
    return [sum(signs[record.tenant] * service(record, moment) for record in records) for moment in moments]


def service(record: Record, now: float) -> float:
    """What a request has had until a moment: its prompt with the first token, and its answer evenly from then on."""
    if record.first_token_at is None or record.ended_at is None or record.first_token_at > now:
        return 0.0
    span = record.ended_at - record.first_token_at
    share = min(1.0, (now - record.first_token_at) / span) if span else 1.0
    return record.num_prompt_tokens + OUTPUT_WEIGHT * record.num_output_tokens * share


def _light_claims() -> list[Claim]:
    """A tenant within its share should hardly notice the flood."""
    rate_rps = STEADY_RPS / 4
    ttft_s = {
        order: mean([record.ttft_s for record in played(order, rate_rps) if record.tenant == "steady"])
        for order in ("fcfs", "fair")
    }
    note = f"one a100, {rate_rps:g} requests/s beside {FLOOD_RPS:g}: {ttft_s['fcfs']:.1f} and {ttft_s['fair']:.1f} s"
    name = "fairness/mean first token of a tenant within its share, fcfs over fair"
    figure = Figure(name, ratio(ttft_s["fcfs"], ttft_s["fair"]), "x", note=note)
    return [Claim(PAPER, "sooner than with fcfs", figure, least=1.0)]
