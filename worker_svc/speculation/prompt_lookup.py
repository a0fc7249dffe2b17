"""Prompt lookup for the sequences of an engine: an index for each, and the drafts of a step. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Final

from worker_svc.sequence import Sequence
from worker_svc.speculation.acceptance import NO_DRAFT, AcceptanceRates, SequenceAcceptance
from worker_svc.speculation.length import DraftLength
from worker_svc.speculation.ngram import FIRST_CHANCES, MAX_MATCH, NgramIndex
from worker_svc.speculation.speculation import Patience, StepOutcome

# Steps in a row without a drafted token that stood, after which all but each eighth are left alone: a look costs
# 0.1 ms, which is 5 % of a step of a 6M-parameter model (AMD EPYC, 2026), and a text that begins to copy goes on for
# longer.
REST_AFTER: Final = 16
LOOK_EVERY: Final = 8
# Tokens of a sequence that are indexed at a time, about 2 ms: a prompt that is cached comes all at once.
MAX_INDEXED: Final = 4096


class LookupStream:
    """Prompt lookup for one sequence."""

    __slots__ = ("_acceptance", "_index", "foreseen")

    def __init__(self, rates: AcceptanceRates) -> None:
        """`rates`: of all sequences, by grades of `ngram`."""
        self.foreseen = NO_DRAFT  # what comes after the sequence's tokens, whether it is computed or not
        self._index = NgramIndex()
        self._acceptance = SequenceAcceptance(rates)

    def follow(self, sequence: Sequence) -> None:
        """Take in tokens that are new."""
        start, end = len(self._index), sequence.num_known_tokens
        if start < end:
            self._index.extend(sequence.token_ids[start : min(start + MAX_INDEXED, end)])

    def foresee(self, sequence: Sequence, count: int, least: float | None) -> list[float]:
        """Foresee the tokens that are worth it, `count` at most, and at least one to learn from.

        Args:
            least: chance of a token that is worth it; None if none is.

        Returns:
            The chances of those that are worth it. Mutates: `foreseen`.
        """
        self.foreseen = NO_DRAFT
        self.follow(sequence)
        is_complete = len(self._index) == sequence.num_known_tokens
        match = self._index.find() if is_complete else None
        if match is None:
            return []
        grades = (min(match.length + i, MAX_MATCH) for i in range(count))
        chances = [] if least is None else self._acceptance.chances(grades, least)
        self.foreseen = self._index.propose(max(len(chances), 1))
        return chances

    def observe(self, token_ids: list[int]) -> None:
        """Learn from the tokens that came."""
        self._acceptance.observe(self.foreseen, token_ids)
        self.foreseen = NO_DRAFT


class PromptLookup:
    """Drafts from each sequence's own tokens; a `Speculation`."""

    def __init__(self, max_length: int, *, overlaps: bool = False) -> None:
        """Start with no sequence known.

        Args:
            max_length: of a draft, in tokens.
            overlaps: whether a step is planned before the tokens of the one before are known, unless this one `waits`.
        """
        self.max_length = max_length
        self._rates = AcceptanceRates(FIRST_CHANCES)
        self._length = DraftLength()
        self._patience = Patience(overlaps)
        self._num_idle_steps = 0  # decodes in a row of which no drafted token stood
        self._streams: dict[Sequence, LookupStream] = {}

    @property
    def waits(self) -> bool:
        return self._patience.waits

    def rests(self) -> bool:
        if not self.waits:
            return False
        self._num_idle_steps += 1
        if self._num_idle_steps <= REST_AFTER or self._num_idle_steps % LOOK_EVERY == 0:
            return False
        self._patience.note(False)
        return True

    def draft(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[Ordered[int]]:
        lengths = self._choose(sequences, rooms, max_drafts)
        self._patience.note(any(lengths))
        return [
            self._streams[sequence].foreseen.token_ids[:length]
            for sequence, length in zip(sequences, lengths, strict=True)
        ]

    def observe(self, outcome: StepOutcome) -> None:
        for sequence in outcome.sequences:
            self._stream(sequence).follow(sequence)
        for emitted in outcome.emitted:
            self._stream(emitted.sequence).observe(emitted.token_ids)
            if len(emitted.token_ids) > 1:
                self._num_idle_steps = 0
        if not outcome.is_decode:
            return
        self._length.observe(
            len(outcome.emitted),
            sum(emitted.first_index for emitted in outcome.emitted),
            sum(emitted.num_drafts for emitted in outcome.emitted),
            sum(len(emitted.token_ids) for emitted in outcome.emitted),
            outcome.seconds,
            is_held_up=self._patience.is_held_up,
        )
        if not self.waits:
            self._reconsider([emitted.sequence for emitted in outcome.emitted])

    def forget(self, sequence: Sequence) -> None:
        self._streams.pop(sequence, None)

    def _reconsider(self, sequences: list[Sequence]) -> None:
        """Wait from now on, if there would be a draft now."""
        rooms = [self.max_length] * len(sequences)
        if any(self._choose(sequences, rooms, sum(rooms))):
            self._patience.note(True)

    def _choose(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[int]:
        num_context = sum(sequence.num_known_tokens for sequence in sequences)
        least = self._length.least_chance(len(sequences), num_context, max_drafts)
        chances = [
            self._stream(sequence).foresee(sequence, min(room, self.max_length), least)
            for sequence, room in zip(sequences, rooms, strict=True)
        ]
        return self._length.choose(chances, num_context, max_drafts)

    def _stream(self, sequence: Sequence) -> LookupStream:
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = LookupStream(self._rates)
        return stream
