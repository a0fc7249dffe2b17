"""Decoding without a model: known texts come token by token, and a step's seconds are a function of what it computes.

Prompt lookup drafts, the real books decide and learn; so what speculation gains and loses can be told exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

from worker_svc.speculation.acceptance import AcceptanceRates, Draft, SequenceAcceptance
from worker_svc.speculation.length import DraftLength
from worker_svc.speculation.ngram import FIRST_CHANCES, MAX_MATCH, NgramIndex

MAX_DRAFTS = 256
# Seconds of a step by its tokens, drafts included.
Cost = Callable[[int], float]


def copying(length: int, prompt: list[int]) -> list[int]:
    """Text that says the prompt again and again."""
    return [prompt[i % len(prompt)] for i in range(length)]


def fresh(length: int, rng: random.Random) -> list[int]:
    """Text of frequent and rare tokens that repeats itself by chance only."""
    return [int(rng.paretovariate(0.6)) % 4096 for _ in range(length)]


@dataclass
class Stream:
    """One sequence: its text, of which `num_emitted` tokens are out."""

    text: list[int]
    index: NgramIndex
    acceptance: SequenceAcceptance
    num_emitted: int = 0

    def chances(self, count: int, least: float | None) -> list[float]:
        match = self.index.find()
        count = min(count, len(self.text) - self.num_emitted - 1)
        if match is None or least is None:
            return []
        return self.acceptance.chances([min(match.length + i, MAX_MATCH) for i in range(count)], least)

    def emit(self, draft: Draft, length: int) -> int:
        """Take the draft's first tokens as far as they are right, and one more. Returns how many that is."""
        coming = self.text[self.num_emitted :]
        pairs = zip(draft.token_ids[:length], coming, strict=False)
        count = 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.acceptance.observe(draft, coming[:count])
        self.index.extend(coming[:count])
        self.num_emitted += count
        return count


@dataclass
class Decoding:
    """A batch of texts, and the clock of what was computed."""

    prompts: list[list[int]]
    texts: list[list[int]]
    cost: Cost
    max_length: int = 8
    noise: float = 0.0
    seed: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0  # what the same tokens take without drafts
    num_drafts: list[int] = field(default_factory=list)  # of each step
    length: DraftLength = field(default_factory=DraftLength)

    def run(self) -> Decoding:
        rates, rng = AcceptanceRates(FIRST_CHANCES), random.Random(self.seed)
        streams = [Stream(text, NgramIndex(), SequenceAcceptance(rates)) for text in self.texts]
        for stream, prompt in zip(streams, self.prompts, strict=True):
            stream.index.extend(prompt)
        self.plain_seconds = sum(self.cost(sum(len(text) > i for text in self.texts)) for i in range(self.longest))
        while live := [stream for stream in streams if stream.num_emitted < len(stream.text)]:
            self._step(live, rng)
        return self

    @property
    def longest(self) -> int:
        return max(map(len, self.texts))

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.seconds

    def _step(self, live: list[Stream], rng: random.Random) -> None:
        context = sum(len(stream.index) for stream in live)
        least = self.length.least_chance(len(live), context, MAX_DRAFTS)
        chances = [stream.chances(self.max_length, least) for stream in live]
        # One token is foreseen in any case, to learn from it.
        drafts = [stream.index.propose(max(len(of), 1)) for stream, of in zip(live, chances, strict=True)]
        lengths = self.length.choose(chances, context, MAX_DRAFTS)
        num_emitted = sum(stream.emit(*one) for stream, *one in zip(live, drafts, lengths, strict=True))
        seconds = self.cost(len(live) + sum(lengths)) * max(rng.gauss(1, self.noise), 0.1)
        self.length.observe(len(live), context, sum(lengths), num_emitted, seconds)
        self.seconds += seconds
        self.num_drafts.append(sum(lengths))
