"""How much of the prompts one LRU cache of blocks would have had: Mooncake (FAST '25), figure 9.

The published trace gives these to three digits, so they check the reader and the index and not a model of anything.
"""

from __future__ import annotations

from typing import Final

from lab.report import Figure
from lab.reproduce.claim import Claim
from lab.reproduce.workload import Traces
from lab.simulator.trace import Trace, lru_hit_ratio

CONVERSATION: Final = "mooncake_conversation_trace"
# Tokens that the cache holds, and the share of the prompts' tokens that it has on the conversation trace.
CAPACITIES: Final[dict[str, tuple[int | None, float]]] = {
    "100k": (100_000, 0.042),
    "1M": (1_000_000, 0.054),
    "3M": (3_000_000, 0.138),
    "10M": (10_000_000, 0.291),
    "30M": (30_000_000, 0.366),
    "unbounded": (None, 0.374),
}


def claims(traces: Traces) -> list[Claim]:
    trace = traces.conversation(spread=False)
    return [_claim(trace, name, capacity, known) for name, (capacity, known) in CAPACITIES.items()]


def _claim(trace: Trace, name: str, capacity: int | None, known: float) -> Claim:
    hit_ratio = round(lru_hit_ratio(trace, capacity), 3)
    figure = Figure(
        f"lru/{name}", hit_ratio, "of prompt tokens", note=f"{len(trace.arrivals)} requests in the order of the file"
    )
    if trace.name != CONVERSATION:
        return Claim("", "", figure)
    return Claim("Mooncake's conversation trace", f"{known:.3f}", figure, least=known, most=known)
