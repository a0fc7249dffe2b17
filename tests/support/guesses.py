"""Drafts that are often right, from a runner that knows the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence as Ordered

from tests.support.token_runner import TokenRunner
from worker_svc.sequence import Sequence
from worker_svc.speculation.speculation import StepOutcome

MAX_LENGTH = 5


class Guesses:
    """A `Speculation` that guesses greedy tokens, of which two in ten are wrong."""

    def __init__(self, runner: TokenRunner, *, waits: bool = True, seed: int = 0) -> None:
        self.waits = waits
        self.max_length = MAX_LENGTH
        self.outcomes: list[StepOutcome] = []
        self.forgotten: list[Sequence] = []
        self._runner = runner
        self._rng = random.Random(seed)

    def rests(self) -> bool:
        return False

    def draft(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[Ordered[int]]:
        drafts: list[Ordered[int]] = []
        for sequence, room in zip(sequences, rooms, strict=True):
            count = min(room, max_drafts, self._rng.randrange(MAX_LENGTH + 1))
            drafts.append(self._guess(sequence.token_ids, count))
            max_drafts -= count
        return drafts

    def observe(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)

    def _guess(self, token_ids: list[int], count: int) -> list[int]:
        right = self._runner.greedy(token_ids, count)
        wrong = [self._rng.randrange(self._runner.vocab_size) for _ in right]
        return [(b if self._rng.random() < 0.2 else a) for a, b in zip(right, wrong, strict=True)]
