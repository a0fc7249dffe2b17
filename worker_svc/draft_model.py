"""A small model that drafts for a large one, and prompt lookup where that is the surer one; a `Speculation`.

Its cache has as many blocks as the target's and uses the target's block tables (`speculation/draft_book.py`). It drafts
token by token, all sequences in one pass, with the noise that the target will sample with, and goes on as long as
another round pays: for the sequences whose next token is likely enough, as told by how sure the draft model was of the
ones before it.

What it has to read first of a sequence is not paid back by one step. So there is a second account, in seconds: saved
ones and a small share of all go in, reading comes out of it, and with nothing in it nothing is read.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.runner import ModelRunner
from worker_svc.sampler import Foreseen, is_greedy
from worker_svc.sequence import Sequence
from worker_svc.speculation import ngram
from worker_svc.speculation.acceptance import NO_DRAFT, AcceptanceRates, Draft, SequenceAcceptance
from worker_svc.speculation.cost import RoundCost
from worker_svc.speculation.draft_book import DraftBook
from worker_svc.speculation.length import ALLOWANCE, Choice, DraftLength
from worker_svc.speculation.prompt_lookup import LookupStream
from worker_svc.speculation.speculation import Patience, StepOutcome
from worker_svc.step_input import StepInput

# A drafted token's grade is which of these its margin exceeds; sampled ones have grades of their own.
MARGINS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 6.0)
# What is believed of the grades at first: what the demo models have.
FIRST_CHANCES: Final = (0.3, 0.35, 0.45, 0.55, 0.6, 0.75, 0.85, 0.9, 0.95)
# Uncomputed tokens of a sequence that a round takes in passing.
MAX_IN_PASSING: Final = 16
# Weight of the past in what a sequence's next token is expected to be accepted with.
CHANCE_MEMORY: Final = 0.9
FIRST_CHANCE: Final = 0.5
# And in what was saved, at each step.
SAVING_MEMORY: Final = 0.999


class Foresight(Protocol):
    """The target's sampler."""

    def foresee(self, logits: torch.Tensor, sequences: list[Sequence], rows: list[int], offset: int) -> Foreseen:
        """As `Sampler`."""


@dataclass(slots=True)
class _Stream:
    """What is known of one sequence."""

    lookup: LookupStream
    acceptance: SequenceAcceptance  # of what the model drafts
    expected: float  # chance of a token that the model has not drafted yet
    foreseen: Draft = NO_DRAFT  # by the model


@dataclass(slots=True)
class _Drafting:
    """The drafts of one step as they grow; lists by sequence."""

    sequences: list[Sequence]
    rooms: Ordered[int]
    max_drafts: int
    streams: list[_Stream]
    num_context: int = field(init=False)
    token_ids: list[list[int]] = field(init=False)
    grades: list[list[int]] = field(init=False)
    chances: list[list[float]] = field(init=False)
    seconds: float = 0.0  # of the rounds so far, without what was read first

    def __post_init__(self) -> None:
        self.num_context = sum(sequence.num_known_tokens for sequence in self.sequences)
        self.token_ids = [[] for _ in self.sequences]
        self.grades = [[] for _ in self.sequences]
        self.chances = [[] for _ in self.sequences]

    def next_chance(self, i: int) -> float:
        """That the next token of a sequence will be accepted, with all before it."""
        return self.streams[i].expected * (self.chances[i][-1] if self.chances[i] else 1.0)

    def look_up(self, i: int, least: float | None) -> bool:
        """Draft for a sequence by prompt lookup. Returns: whether it was tried and found less sure than the model."""
        stream = self.streams[i]
        chances = stream.lookup.foresee(self.sequences[i], self.rooms[i], least)
        if chances and chances[0] >= stream.expected:
            self.token_ids[i], self.chances[i] = list(stream.lookup.foreseen.token_ids), chances
            return False
        return True

    def add(self, i: int, token_id: int, grade: int) -> float:
        """Returns: the chance that the token is accepted if all before it are."""
        stream = self.streams[i]
        (chance,) = stream.acceptance.chances([grade], 0.0)
        stream.expected = CHANCE_MEMORY * stream.expected + (1 - CHANCE_MEMORY) * chance
        self.chances[i].append(chance * (self.chances[i][-1] if self.chances[i] else 1.0))
        self.token_ids[i].append(token_id)
        self.grades[i].append(grade)
        return chance


class DraftModel:
    """Drafts by a model of its own; a `Speculation`."""

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Foresight,
        *,
        max_length: int,
        max_num_batched_tokens: int,
        overlaps: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with no sequence known.

        Args:
            runner: of the draft model; it has as many blocks as the target's.
            sampler: the target's.
            max_length: of a draft, in tokens.
            max_num_batched_tokens: that a pass of the draft model computes at most.
            overlaps: whether a step is planned before the tokens of the one before are known, unless this one `waits`.
        """
        self.max_length = max_length
        self._runner = runner
        self._sampler = sampler
        self._max_tokens = max_num_batched_tokens
        self._clock = clock
        self._book = DraftBook()
        self._rates = AcceptanceRates(2 * FIRST_CHANCES)
        self._lookup_rates = AcceptanceRates(ngram.FIRST_CHANCES)
        self._length = DraftLength()
        self._round_cost = RoundCost()
        self._patience = Patience(overlaps)
        self._streams: dict[Sequence, _Stream] = {}
        self._expected = FIRST_CHANCE
        self._drafting_s = 0.0  # of the step that is being computed
        self._reading_s = 0.0
        self._saved_s = 0.0

    @property
    def waits(self) -> bool:
        return self._patience.waits

    def rests(self) -> bool:
        return False

    def draft(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[Ordered[int]]:
        self._drafting_s = self._reading_s = 0.0
        drafting = _Drafting(list(sequences), rooms, max_drafts, [self._stream(sequence) for sequence in sequences])
        least = self._length.least_chance(len(sequences), drafting.num_context, max_drafts)
        others = [i for i in range(len(sequences)) if drafting.look_up(i, least)]
        active = [] if least is None else self._ready(drafting, others)
        for offset in range(self.max_length):
            active = self._worth_another(drafting, active, least or 0.0)
            if not active:
                break
            self._draft_token(drafting, active, offset)
        self._drafting_s = drafting.seconds
        for stream, token_ids, grades in zip(drafting.streams, drafting.token_ids, drafting.grades, strict=True):
            stream.foreseen = Draft(token_ids, grades) if grades else NO_DRAFT
        # What drafting took is spent in any case.
        choice = self._weigh(drafting, drafting.chances, 0.0)
        is_worth_it = choice is not None and self._length.allows(choice)
        self._patience.note(is_worth_it)
        if choice is None or not is_worth_it:
            return [() for _ in sequences]
        return [token_ids[:count] for token_ids, count in zip(drafting.token_ids, choice.lengths, strict=True)]

    def observe(self, outcome: StepOutcome) -> None:
        for sequence in outcome.sequences:
            self._stream(sequence).lookup.follow(sequence)
        for emitted in outcome.emitted:
            stream = self._stream(emitted.sequence)
            stream.lookup.observe(emitted.token_ids)
            stream.acceptance.observe(stream.foreseen, emitted.token_ids)
            stream.foreseen = NO_DRAFT
            # The last one is the target's own; if the draft model has it as well, it computes it again.
            self._book.keep(emitted.sequence, emitted.first_index + len(emitted.token_ids) - 1)
        if not outcome.is_decode:
            return
        saved_s = self._length.observe(
            len(outcome.emitted),
            sum(emitted.first_index for emitted in outcome.emitted),
            sum(emitted.num_drafts for emitted in outcome.emitted),
            sum(len(emitted.token_ids) for emitted in outcome.emitted),
            outcome.seconds - self._drafting_s - self._reading_s,
            drafting_s=self._drafting_s,
            is_held_up=self._patience.is_held_up,
        )
        self._saved_s = SAVING_MEMORY * self._saved_s + saved_s + ALLOWANCE * outcome.seconds - self._reading_s
        self._patience.pass_by()

    def forget(self, sequence: Sequence) -> None:
        self._streams.pop(sequence, None)
        self._book.forget(sequence)

    def _ready(self, drafting: _Drafting, others: list[int]) -> list[int]:
        """Those of the `others` of which the draft model has little to read, or may read much."""
        ready: list[int] = []
        budget = self._max_tokens
        for i in others:
            sequence = drafting.sequences[i]
            count = sequence.num_known_tokens - self._book.num_computed(sequence)
            is_allowed = count <= MAX_IN_PASSING or self._saved_s >= 0
            if is_allowed and count <= budget and sequence.num_known_tokens < self._runner.max_model_len:
                ready.append(i)
                budget -= count
        return ready

    def _worth_another(self, drafting: _Drafting, active: list[int], least: float) -> list[int]:
        """Those of the `active` sequences for which to draft one token more."""
        longer = list(drafting.chances)
        for i in active:
            chance = drafting.next_chance(i)
            if chance >= least and len(longer[i]) < drafting.rooms[i]:
                longer[i] = [*longer[i], chance]
        round_s = self._round_cost.seconds(len(active))
        choice = self._weigh(drafting, longer, drafting.seconds + round_s)
        if choice is None:
            return []
        current = self._weigh(drafting, drafting.chances, drafting.seconds)
        is_worth_it = self._length.allows(choice) if current is None else choice.gain > current.gain
        return [i for i in active if is_worth_it and choice.lengths[i] > len(drafting.chances[i])]

    def _weigh(self, drafting: _Drafting, chances: list[list[float]], seconds: float) -> Choice | None:
        return self._length.weigh(chances, drafting.num_context, drafting.max_drafts, seconds)

    def _draft_token(self, drafting: _Drafting, active: list[int], offset: int) -> None:
        """One pass of the draft model, which gives each of the `active` sequences a token more."""
        began = self._clock()
        step, is_reading = self._make_step(drafting, active, offset)
        logits = self._runner.forward(step)
        found = self._sampler.foresee(logits, drafting.sequences, active, offset)
        for i, token_id, margin in zip(active, found.token_ids, found.margins, strict=True):
            chance = drafting.add(i, token_id, _grade(margin, drafting.sequences[i]))
            self._expected = CHANCE_MEMORY * self._expected + (1 - CHANCE_MEMORY) * chance
        seconds = self._clock() - began
        if is_reading:
            round_s = min(seconds, self._round_cost.seconds(len(active)))
            self._reading_s += seconds - round_s
            drafting.seconds += round_s
        else:
            self._round_cost.observe(len(step.token_ids), seconds)
            drafting.seconds += seconds

    def _make_step(self, drafting: _Drafting, active: list[int], offset: int) -> tuple[StepInput, bool]:
        """The pass as columns, and whether some sequence has much to be read."""
        step = StepInput([], [], [], [], [], [], [])
        is_reading = False
        for i in active:
            sequence = drafting.sequences[i]
            end = sequence.num_known_tokens + offset
            start = end - 1 if offset else self._book.num_computed(sequence)
            is_reading |= end - start > MAX_IN_PASSING
            step.token_ids.extend(drafting.token_ids[i][-1:] if offset else sequence.token_ids[start:end])
            step.positions.extend(range(start, end))
            table = sequence.block_table
            step.slot_mapping.extend(table[j // BLOCK_SIZE] * BLOCK_SIZE + j % BLOCK_SIZE for j in range(start, end))
            step.query_lens.append(end - start)
            step.seq_lens.append(end)
            step.block_tables.append(table)
            step.logit_rows.append(len(step.token_ids) - 1)
            self._book.write(sequence, start, end)
        return step, is_reading

    def _stream(self, sequence: Sequence) -> _Stream:
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = _Stream(
                LookupStream(self._lookup_rates), SequenceAcceptance(self._rates), self._expected
            )
        return stream


def _grade(margin: float, sequence: Sequence) -> int:
    return bisect(MARGINS, margin) + (0 if is_greedy(sequence.sampling) else len(FIRST_CHANCES))
