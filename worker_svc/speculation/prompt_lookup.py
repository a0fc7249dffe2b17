"""Prompt lookup for the sequences of an engine: an index for each, and the drafts of a step. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Final

from worker_svc.sequence import Sequence
from worker_svc.speculation.acceptance import NO_DRAFT, AcceptanceRates, Draft, SequenceAcceptance
from worker_svc.speculation.length import DraftLength
from worker_svc.speculation.ngram import MAX_MATCH, NUM_GRADES, NgramIndex
from worker_svc.speculation.speculation import StepOutcome

# Tokens of a sequence that are indexed at a time, about 2 ms: a prompt that is cached comes all at once.
MAX_INDEXED: Final = 4096
# Steps in a row without a draft after which no device needs to stand idle for the sake of the next.
PATIENCE: Final = 8


@dataclass(slots=True)
class _Stream:
    """What is known of one sequence."""

    index: NgramIndex
    acceptance: SequenceAcceptance
    foreseen: Draft = NO_DRAFT  # what comes after the tokens of the index, whether it is computed or not

    def follow(self, sequence: Sequence) -> None:
        start, end = len(self.index), sequence.num_known_tokens
        if start < end:
            self.index.extend(sequence.token_ids[start : min(start + MAX_INDEXED, end)])

    def foresee(self, sequence: Sequence, count: int, least: float | None) -> list[float]:
        """Foresee the tokens that are worth it, up to `count`, and at least one to learn from. Returns: chances."""
        self.foreseen = NO_DRAFT
        self.follow(sequence)
        is_complete = len(self.index) == sequence.num_known_tokens
        match = self.index.find() if is_complete else None
        if match is None:
            return []
        grades = (min(match.length + i, MAX_MATCH) for i in range(count))
        chances = [] if least is None else self.acceptance.chances(grades, least)
        self.foreseen = self.index.propose(max(len(chances), 1))
        return chances


class PromptLookup:
    """Drafts from each sequence's own tokens; a `Speculation`."""

    def __init__(self, max_length: int, *, overlaps: bool = False) -> None:
        """Start with no sequence known.

        Args:
            max_length: of a draft, in tokens.
            overlaps: whether a step is planned before the tokens of the one before are known, unless this one `waits`.
        """
        self._max_length = max_length
        self._overlaps = overlaps
        self._rates = AcceptanceRates(NUM_GRADES)
        self._length = DraftLength()
        self._streams: dict[Sequence, _Stream] = {}
        self._num_idle_steps = PATIENCE  # in a row

    @property
    def waits(self) -> bool:
        return not self._overlaps or self._num_idle_steps < PATIENCE

    def draft(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[Ordered[int]]:
        lengths = self._choose(sequences, rooms, max_drafts)
        self._num_idle_steps = 0 if any(lengths) else self._num_idle_steps + 1
        return [
            self._streams[sequence].foreseen.token_ids[:length]
            for sequence, length in zip(sequences, lengths, strict=True)
        ]

    def observe(self, outcome: StepOutcome) -> None:
        for sequence in outcome.sequences:
            self._stream(sequence).follow(sequence)
        for emitted in outcome.emitted:
            stream = self._stream(emitted.sequence)
            stream.acceptance.observe(stream.foreseen, emitted.token_ids)
            stream.foreseen = NO_DRAFT
        if not outcome.is_decode:
            return
        self._length.observe(
            len(outcome.emitted),
            sum(emitted.first_index for emitted in outcome.emitted),
            sum(emitted.num_drafts for emitted in outcome.emitted),
            sum(len(emitted.token_ids) for emitted in outcome.emitted),
            outcome.seconds,
            is_held_up=self._overlaps and self.waits,
        )
        if not self.waits:
            self._reconsider([emitted.sequence for emitted in outcome.emitted])

    def forget(self, sequence: Sequence) -> None:
        self._streams.pop(sequence, None)

    def _reconsider(self, sequences: list[Sequence]) -> None:
        """Wait from now on, if there would be a draft now."""
        if any(self._choose(sequences, [self._max_length] * len(sequences), self._max_length * len(sequences))):
            self._num_idle_steps = 0

    def _choose(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[int]:
        num_context = sum(sequence.num_known_tokens for sequence in sequences)
        least = self._length.least_chance(len(sequences), num_context, max_drafts)
        chances = [
            self._stream(sequence).foresee(sequence, min(room, self._max_length), least)
            for sequence, room in zip(sequences, rooms, strict=True)
        ]
        return self._length.choose(chances, num_context, max_drafts)

    def _stream(self, sequence: Sequence) -> _Stream:
        stream = self._streams.get(sequence)
        if stream is None:
            stream = self._streams[sequence] = _Stream(NgramIndex(), SequenceAcceptance(self._rates))
        return stream
