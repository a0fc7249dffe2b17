"""What the claims are measured on: the public traces, or one that stands in for all of them, and made-up ones.

Made-up arrivals come from a seed, so each run is the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lab.simulator.trace import Arrival, Drawing, Trace, read
from weft.errors import SettingsError

# vLLM's blocks, for lengths that come without ids.
TOKEN_BLOCK: Final = 16

Lengths = Sequence[tuple[int, int]]  # (tokens of the prompt, tokens of the answer)


@dataclass(frozen=True, slots=True)
class Traces:
    """Where traces are, and the one that is to be used instead of any of them."""

    folder: Path
    instead: Path | None = None

    def conversation(self, *, spread: bool = True) -> Trace:
        """Mooncake's."""
        return read(self.instead or self.folder / "mooncake_conversation_trace.jsonl.xz", spread=spread)

    def first(self, name: str, count: int) -> Trace:
        """So many requests of a file, drawn at ten a second where it has no arrivals."""
        return read(self.instead or self.folder / name, drawn=Drawing(num_requests=count)).first(count)

    def azure_lengths(self, kind: str, count: int, max_tokens: int) -> Lengths:
        """The first requests of the code or conv trace that are not longer than `max_tokens` in all."""
        return self._lengths(f"azure_llm_2023_{kind}.csv", count, max_tokens)

    def arxiv_lengths(self, count: int, max_tokens: int) -> Lengths:
        """Of summaries of papers."""
        return self._lengths("vidur_arxiv_summarization_lengths.csv", count, max_tokens)

    def _lengths(self, name: str, count: int, max_tokens: int) -> Lengths:
        path = self.instead or self.folder / name
        every = [(arrival.num_prompt_tokens, arrival.num_output_tokens) for arrival in read(path).arrivals]
        found = [(prompt, answer) for prompt, answer in every if prompt + answer <= max_tokens][:count]
        if not found:
            raise SettingsError(f"trace {path} has no request of at most {max_tokens} tokens")
        return found


def poisson(lengths: Lengths, rate_rps: float, seed: int = 1) -> Trace:
    """Requests of these lengths, in this order, at random moments."""
    chance, now, arrivals = random.Random(seed), 0.0, []
    for prompt, answer in lengths:
        now += chance.expovariate(rate_rps)
        arrivals.append(Arrival(now, prompt, answer))
    return Trace("poisson", tuple(arrivals), TOKEN_BLOCK)


def merged(traces: Iterable[Trace]) -> Trace:
    """All arrivals in the order of their times."""
    found = list(traces)
    arrivals = sorted((arrival for trace in found for arrival in trace.arrivals), key=lambda arrival: arrival.at_s)
    return Trace("+".join(trace.name for trace in found), tuple(arrivals), found[0].block_size)


def of_tenant(trace: Trace, tenant: str) -> Trace:
    return replace(trace, arrivals=tuple(replace(arrival, tenant=tenant) for arrival in trace.arrivals))


def first_token_only(trace: Trace) -> Trace:
    """The same prompts, each answered with one token."""
    return replace(trace, arrivals=tuple(replace(arrival, num_output_tokens=1) for arrival in trace.arrivals))


def heavy_tail(chance: random.Random, mean: float, most: int) -> int:
    """Tokens of an answer: log-normal, of which the longest hundredth are about ten times the mean."""
    sigma = 1.5
    return max(1, min(most, round(chance.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))
