"""Paged KV memory against memory reserved for the whole answer: vLLM (Kwon et al. 2023, SOSP), figures 2, 12 and 13.

One worker has all requests from the start and computes until they have ended, with the shipping `plan_step` and
`BlockPool`; what is counted is how many run at once, how soon all end, and how many slots hold no token.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lab.report import Figure
from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.workload import TOKEN_BLOCK, Lengths, Traces, heavy_tail
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Record
from lab.simulator.worker import SimWorker
from weft.messages import Choice, SamplingParams, TokenizedRequest
from worker_svc.batch import RESERVATIONS, Limits

NUM_REQUESTS: Final = 600
# What OPT-13B leaves of an A100 with 40 GB, and how long its sequences may be (vLLM, table 1 and section 6.1).
KV_TOKENS: Final = 15_700
MAX_MODEL_LEN: Final = 2_048
PAPER: Final = "vLLM"
# How many times as many requests run at once with paged memory (figure 13a), and how many times the rate it sustains.
CLAIMED: Final[dict[str, tuple[float, float] | None]] = {
    "reserve_max": (4.3, 2.7),
    "reserve_pow2": None,
    "reserve_oracle": (2.2, 1.7),
}
# Mean prompt and answer of vLLM's ShareGPT workload (figure 11).
CHAT_MEANS: Final = (161, 338)
WHY: Final = (
    "reservations are of blocks here and so do not fragment, and the longer the prompt, the less there is to reserve"
)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one worker's memory, over the time in which it computed."""

    num_running: float  # mean
    requests_per_s: float
    wasted: float  # share of the slots in use that hold no token


def claims(traces: Traces) -> list[Claim]:
    conv = traces.azure_lengths("conv", NUM_REQUESTS, MAX_MODEL_LEN)
    workloads = {
        "conv": (conv, f"first {len(conv)} Azure conv lengths to {MAX_MODEL_LEN} tokens"),
        "chat": (_chat(), f"{NUM_REQUESTS} made-up lengths of mean {CHAT_MEANS}, as ShareGPT's"),
    }
    lines: list[Claim] = []
    for workload, (lengths, what) in workloads.items():
        found = {reserve: occupancy(lengths, reserve) for reserve in RESERVATIONS}
        lines += compared(workload, found, f"{what}, all at once, {KV_TOKENS} tokens of KV")
    return lines


def compared(workload: str, found: Mapping[str, Occupancy], conditions: str) -> list[Claim]:
    """Every reservation against paged memory."""
    paged, lines = found["paged"], []
    for reserve, claimed in CLAIMED.items():
        other = found[reserve]
        at_once = ratio(paged.num_running, other.num_running)
        throughput = ratio(paged.requests_per_s, other.requests_per_s)
        names = [f"reserve/{workload}, {what}, paged over {reserve}" for what in ("at once", "requests/s")]
        note = f"{conditions}: {paged.num_running:.1f} and {other.num_running:.1f} at once"
        if claimed is None:
            lines += [shown(names[0], at_once, "x", note), shown(names[1], throughput, "x", conditions)]
        else:
            lines.append(at_least(names[0], at_once, claimed[0], f"{PAPER} fig. 13", note, WHY))
            lines.append(at_least(names[1], throughput, claimed[1], f"{PAPER} section 6.2", conditions, WHY))
    wasted = Figure(f"reserve/{workload}, slots wasted, paged", 100 * paged.wasted, "%", note=conditions)
    why = "blocks are taken ahead of growth while more than half are free"
    lines.append(Claim(f"{PAPER} fig. 2", "less than 4 %", wasted, least=0.0, most=4.0, why=why))
    for reserve in CLAIMED:
        name = f"reserve/{workload}, slots wasted, {reserve}"
        lines.append(shown(name, 100 * found[reserve].wasted, "%", conditions))
    return lines


def occupancy(lengths: Lengths, reserve: str) -> Occupancy:
    """Let one worker compute all requests."""
    limits = Limits(256, 2048, reserve=reserve, max_model_len=MAX_MODEL_LEN)
    cost = HARDWARE["a100"].cost
    worker = SimWorker("w0", cost, limits, num_blocks=KV_TOKENS // TOKEN_BLOCK, block_size=TOKEN_BLOCK)
    for i, (prompt, answer) in enumerate(lengths):
        worker.take(_request(i, prompt), Record(f"r{i}", 0.0, prompt, answer), None)
    now = running = held = used = 0.0
    while (ends_at := worker.begin(now)[0]) is not None:
        seconds = ends_at - now
        running += seconds * len(worker.running)
        held += seconds * TOKEN_BLOCK * sum(len(sequence.block_table) for sequence in worker.running)
        now = ends_at
        worker.finish(now)
        used += seconds * sum(sequence.num_computed_tokens for sequence in worker.running)
    return Occupancy(running / now, len(lengths) / now, 1 - used / held)


def _chat() -> Lengths:
    chance = random.Random(1)
    return [
        (heavy_tail(chance, CHAT_MEANS[0], MAX_MODEL_LEN // 2), heavy_tail(chance, CHAT_MEANS[1], MAX_MODEL_LEN // 2))
        for _ in range(NUM_REQUESTS)
    ]


def _request(number: int, num_prompt_tokens: int) -> TokenizedRequest:
    return TokenizedRequest(
        request_id=f"r{number}",
        epoch=0,
        gateway="",
        model="",
        prompt_token_ids=bytes(4 * num_prompt_tokens),
        block_hashes=b"",
        sampling=SamplingParams(),
        choices=[Choice(0, 0)],
    )
