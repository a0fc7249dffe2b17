"""What the engine asks of whoever drafts, and what it tells them. Pure.

A draft is what may come next in a sequence, as tokens that one step computes along with the sequence's last one. The
model's own token is then sampled at each place, with the noise of that place, and the draft stands as far as it says
the same: so the text is that of plain decoding, greedy or sampled, whatever was drafted. What the step wrote into KV
blocks for tokens that do not stand is written over, as those places are not counted as computed.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Final, Protocol

from worker_svc.batch import StepPlan, make_room
from worker_svc.blocks import BlockPool
from worker_svc.sequence import Sequence

# Steps in a row without a draft after which the device stands idle no more, and steps until that is tried again.
PATIENCE: Final = 8
RETRY_INTERVAL: Final = 256


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one step gave one sequence."""

    sequence: Sequence
    first_index: int  # of the tokens in `Sequence.token_ids`
    num_drafts: int  # drafted tokens that the step computed
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A step whose tokens are known, and stand in their sequences."""

    sequences: Ordered[Sequence]  # that it computed tokens of and that have not ended
    emitted: list[Emitted]
    is_decode: bool  # each sequence of the step had one token to compute, and emitted
    seconds: float


class Speculation(Protocol):
    """Drafts for the sequences of an engine."""

    # Of a draft, in tokens.
    max_length: int

    @property
    def waits(self) -> bool:
        """Whether the next step is to be planned only when the tokens of the one before are known."""

    def rests(self) -> bool:
        """Whether the next decode step is to be left alone: neither drafted for nor observed. Asked once for each.

        Mutates: its count of such steps.
        """

    def draft(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[Ordered[int]]:
        """What may come next in each sequence of a decode step, all of whose tokens are known.

        Args:
            rooms: most tokens for each.
            max_drafts: most tokens for all.
        """

    def observe(self, outcome: StepOutcome) -> None:
        """Learn what came of a step, drafted for or not. Called for every step but those that are left alone."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or given its blocks back."""


def draft_step(
    speculation: Speculation, plan: StepPlan, pool: BlockPool, *, num_running: int, max_num_batched_tokens: int
) -> dict[Sequence, Ordered[int]] | None:
    """Tokens to compute after the last ones of a decode step, as far as budget and blocks are left.

    Mutates: block tables, and the pool they are from. Returns: None for a step that is left alone.
    """
    sequences = list(plan.num_scheduled_tokens)
    if not sequences or not plan.is_decode or any(s.num_pending_tokens for s in sequences):
        return {}
    if speculation.rests():
        return None
    rooms = [
        make_room(
            sequence,
            min(speculation.max_length, sequence.end_length - len(sequence.token_ids) - 1),
            pool,
            num_running,
        )
        for sequence in sequences
    ]
    # Decodes alone may be more than the budget where prompts are not cut.
    num_spare = max(0, max_num_batched_tokens - len(sequences))
    drafts = speculation.draft(sequences, rooms, num_spare)
    return {sequence: draft for sequence, draft in zip(sequences, drafts, strict=True) if draft}


class Patience:
    """Whether a device that computes beside the host stands idle until tokens are known, for the sake of drafts."""

    def __init__(self, overlaps: bool) -> None:
        """`overlaps`: the device does compute beside the host. Otherwise tokens are known in any case."""
        self._overlaps = overlaps
        self._num_idle_steps = PATIENCE  # in a row

    @property
    def waits(self) -> bool:
        return not self._overlaps or self._num_idle_steps < PATIENCE

    @property
    def is_held_up(self) -> bool:
        """Whether steps take longer than they would if nobody waited."""
        return self._overlaps and self.waits

    def note(self, has_drafts: bool) -> None:
        """A step was waited for, and had drafts or had not; or it would have had some."""
        self._num_idle_steps = 0 if has_drafts else self._num_idle_steps + 1

    def pass_by(self) -> None:
        """A step has passed, waited for or not: now and then it is time to try again."""
        if not self.waits:
            self._num_idle_steps += 1
            if self._num_idle_steps >= RETRY_INTERVAL:
                self._num_idle_steps = 0


def standing(draft: Ordered[int], sampled: Ordered[int]) -> int:
    """How many of `sampled` are to be emitted: those where the draft said the same, and one more.

    Args:
        sampled: one more than the draft has, or fewer if the rest cannot be told.
    """
    count = 0
    while count < len(sampled):
        count += 1
        if count > len(draft) or draft[count - 1] != sampled[count - 1]:
            break
    return count
