"""A small model that drafts for a large one; a `Speculation`.

Its cache has as many blocks as the target's and uses the target's block tables (`speculation/draft_book.py`). It drafts
token by token, all sequences in one pass, with the noise that the target will sample with, and goes on as long as
another round pays: for the sequences whose next token is likely enough, as told by how sure the draft model was of the
ones before it.

What it has to read first of a sequence is not paid back by one step. So there is a second account, in seconds: saved
ones and a small share of all go in, reading comes out of it, and with nothing in it nothing is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.runner import ModelRunner
from worker_svc.sampler import Foreseen, is_greedy
from worker_svc.sequence import Sequence
from worker_svc.speculation.acceptance import NO_DRAFT, AcceptanceRates, Draft, SequenceAcceptance
from worker_svc.speculation.cost import RoundCost
from worker_svc.speculation.draft_book import DraftBook
from worker_svc.speculation.length import ALLOWANCE, DraftLength
from worker_svc.speculation.speculation import StepOutcome
from worker_svc.step_input import StepInput

# A drafted token's grade is which of these its margin exceeds; sampled ones have grades of their own.
MARGINS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 6.0)
NUM_GRADES: Final = 2 * (len(MARGINS) + 1)
# Uncomputed tokens of a sequence that a round takes in passing.
MAX_IN_PASSING: Final = 4
# Weight of the past in what a sequence's next token is expected to be accepted with.
CHANCE_MEMORY: Final = 0.9
FIRST_CHANCE: Final = 0.5


class Foresight(Protocol):
    """The target's sampler."""

    def foresee(self, logits: torch.Tensor, sequences: list[Sequence], rows: list[int], offset: int) -> Foreseen:
        """As `Sampler`."""


@dataclass(slots=True)
class _Stream:
    """What is known of one sequence."""

    acceptance: SequenceAcceptance
    expected: float  # chance of a token that is not drafted yet
    foreseen: Draft = NO_DRAFT


@dataclass(slots=True)
class _Drafting:
    """The drafts of one step as they grow; lists by sequence."""

    sequences: list[Sequence]
    rooms: Ordered[int]
    streams: list[_Stream]
    token_ids: list[list[int]] = field(init=False)
    grades: list[list[int]] = field(init=False)
    chances: list[list[float]] = field(init=False)
    seconds: float = 0.0  # of the rounds so far, without what was read first

    def __post_init__(self) -> None:
        self.token_ids, self.grades, self.chances = ([[] for _ in self.sequences] for _ in range(3))

    def next_chance(self, i: int) -> float:
        """That the next token of a sequence will be accepted, and all before it."""
        return self.streams[i].expected * (self.chances[i][-1] if self.chances[i] else 1.0)

    def add(self, i: int, token_id: int, grade: int) -> None:
        stream = self.streams[i]
        (chance,) = stream.acceptance.chances([grade], 0.0)
        stream.expected = CHANCE_MEMORY * stream.expected + (1 - CHANCE_MEMORY) * chance
        self.chances[i].append(chance * (self.chances[i][-1] if self.chances[i] else 1.0))
        self.token_ids[i].append(token_id)
        self.grades[i].append(grade)


class DraftModel:
    """Drafts by a model of its own."""

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Foresight,
        max_length: int,
        max_num_batched_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with no sequence known.

        Args:
            runner: of the draft model; as many blocks as the target's.
            sampler: the target's.
            max_length: of a draft, in tokens.
            max_num_batched_tokens: that a pass of the draft model computes at most.
        """
        self._runner = runner
        self._sampler = sampler
        self._max_length = max_length
        self._max_tokens = max_num_batched_tokens
        self._clock = clock
        self._book = DraftBook()
        self._rates = AcceptanceRates(NUM_GRADES)
        self._length = DraftLength()
        self._round_cost = RoundCost()
        self._streams: dict[Sequence, _Stream] = {}
        self._drafting_s = 0.0
        self._reading_s = 0.0
        self._saved_s = 0.0
        self.max_length = max_length

    waits = True
