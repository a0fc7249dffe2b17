"""Routing by cached prefixes against turns: SGLang's router, version 0.4.

Its workload: groups of requests that share a long system prompt, more of them than one worker's memory holds. Beside it
Mooncake's conversation trace, where most of what can be shared is a conversation's own past.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.workload import TOKEN_BLOCK, Traces
from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Summary
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Arrival, Trace
from scheduler_svc.hardware import Hardware
from scheduler_svc.policies import PolicyMaker, PolicyNames
from worker_svc.batch import Limits

NUM_WORKERS: Final = 8
NUM_GROUPS: Final = 64
NUM_OF_GROUP: Final = 16
SYSTEM_PROMPT: Final = 2_048
QUESTION: Final = 128
ANSWER: Final = 256
# More than the workers can serve, so what ends in a second is what they can.
RATE_RPS: Final = 40.0
NUM_CONVERSATION: Final = 4_000
PAPER: Final = "SGLang v0.4 release"
# With 24 places and 6 requests a second, which leave some free, the hits are .882 and .529 (2026).
TAKEN: Final = "all places are taken, so a request goes where one is freed, whatever is cached there"
OFTEN: Final = "turns find .53 here, where they found .20 there"
# Tokens of KV, places, and what makes the difference. 427k are what Llama 3.1 8B, which they ran, leaves of 80 GB.
SETUPS: Final = ((56_000, 24, TAKEN), (427_000, 24, TAKEN), (427_000, 256, OFTEN))
ROUTES: Final = ("round_robin", "prefix_aware")


def claims(traces: Traces) -> list[Claim]:
    groups, conversation = shared_prefixes(), traces.conversation().first(NUM_CONVERSATION)
    lines: list[Claim] = []
    for kv_tokens, num_places, why in SETUPS:
        note = f"{NUM_GROUPS} groups of {NUM_OF_GROUP} with {SYSTEM_PROMPT} shared + {QUESTION} tokens, "
        note += f"{NUM_WORKERS} a100 of {kv_tokens // 1000}k tokens and {num_places} places"
        found = _run(groups, HARDWARE["a100"], Limits(num_places, 2048), kv_tokens)
        lines += compared(found, note, f"{kv_tokens // 1000}k, {num_places} places", why)
    hardware = HARDWARE["a800"]
    found = _run(conversation, hardware, Limits(256, 2048), hardware.kv_tokens)
    before, after = found["round_robin"], found["prefix_aware"]
    note = f"first {len(conversation.arrivals)} conversation requests, {NUM_WORKERS} a800 of 1.2M tokens"
    name = "sglang/conversation, {}, round_robin over prefix_aware"
    ttft, hits = ratio(before.ttft_mean_s, after.ttft_mean_s), ratio(after.hit_ratio, before.hit_ratio)
    lines.append(shown(name.format("mean first token"), ttft, "x", note))
    lines.append(shown("sglang/conversation, hit ratio, prefix_aware over round_robin", hits, "x", note))
    return lines


def compared(found: Mapping[str, Summary], conditions: str, setup: str, why: str) -> list[Claim]:
    before, after = found["round_robin"], found["prefix_aware"]
    note = f"{conditions}: {after.tokens_per_s:.0f} and {before.tokens_per_s:.0f} tokens/s"
    value = ratio(after.tokens_per_s, before.tokens_per_s)
    throughput = at_least(f"sglang/{setup}, throughput, prefix_aware over round_robin", value, 1.9, PAPER, note, why)
    note = f"{conditions}: {after.hit_ratio:.3f} and {before.hit_ratio:.3f}"
    value = ratio(after.hit_ratio, before.hit_ratio)
    return [
        throughput,
        at_least(f"sglang/{setup}, hit ratio, prefix_aware over round_robin", value, 3.8, PAPER, note, why),
    ]


def shared_prefixes(seed: int = 1) -> Trace:
    """Groups of requests that share all but their questions, in no order."""
    chance, now, arrivals = random.Random(seed), 0.0, []
    num_shared, num_own = SYSTEM_PROMPT // TOKEN_BLOCK, QUESTION // TOKEN_BLOCK
    groups = [group for group in range(NUM_GROUPS) for _ in range(NUM_OF_GROUP)]
    chance.shuffle(groups)
    for number, group in enumerate(groups):
        now += chance.expovariate(RATE_RPS)
        own = NUM_GROUPS * num_shared + number * num_own
        ids = (*range(group * num_shared, (group + 1) * num_shared), *range(own, own + num_own))
        arrivals.append(Arrival(now, SYSTEM_PROMPT + QUESTION, ANSWER, ids))
    return Trace("shared_prefixes", tuple(arrivals), TOKEN_BLOCK)


def _run(trace: Trace, hardware: Hardware, limits: Limits, kv_tokens: int) -> Mapping[str, Summary]:
    fleet = Fleet(NUM_WORKERS, hardware.cost, limits, kv_tokens)
    maker = PolicyMaker(random.Random(1), cost=hardware.cost)
    return {
        route: simulate(trace, Setup(fleet, PolicyNames(admit="open", route=route), maker)).summary()
        for route in ROUTES
    }
