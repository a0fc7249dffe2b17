"""A step that the device has, and what its tokens mean once they are known. Pure.

Tokens that are not known yet stand as `UNKNOWN_TOKEN` in their sequences: one for each that is sampled, whatever was
drafted. Landing puts those in their place that the model gave, as far as the draft stands.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from weft.messages import ErrorInfo
from worker_svc.batch import StepPlan, Work
from worker_svc.sequence import Sequence, State
from worker_svc.speculation.speculation import Emitted, standing

if TYPE_CHECKING:
    from worker_svc.sampler import Logprobs, Samples
    from worker_svc.stopwatch import Stopwatch


class PendingSamples(Protocol):
    """Tokens that were sampled, and may still be on the device."""

    def collect(self) -> Samples:
        """Wait for the tokens and read them."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What a step gave a sequence that still wants it: tokens, or why there are none."""

    emitted: Emitted
    logprobs: tuple[Logprobs, ...]  # of the tokens, if it asks for them
    error: ErrorInfo | None


@dataclass(frozen=True, slots=True)
class Flight:
    """A step under way."""

    plan: StepPlan
    work: Work
    # Each sequence that gets tokens, the index of the first in `token_ids`, and the draft of the others.
    awaited: list[tuple[Sequence, int, Ordered[int]]]
    sampling: PendingSamples | None  # None if nothing was sampled
    began: float
    stopwatch: Stopwatch
    is_observed: bool  # by who drafts

    def land(self) -> list[Landed]:
        """Wait for the tokens and give them to their sequences, but for those that have ended meanwhile.

        Mutates: the sequences.
        """
        if self.sampling is None:
            return []
        samples = self.sampling.collect()
        landed: list[Landed] = []
        row = 0
        for sequence, index, draft in self.awaited:
            if sequence.state is not State.FINISHED:
                landed.append(_take(sequence, index, draft, samples, row))
            row += len(draft) + 1
        return landed


def _take(sequence: Sequence, index: int, draft: Ordered[int], samples: Samples, first_row: int) -> Landed:
    """Give a sequence what was sampled for it from `first_row` on, as far as its draft stands."""
    rows = range(first_row, first_row + len(draft) + 1)
    # Of logits that are not finite nothing follows. Those after drafted tokens come again if they matter.
    known = [samples.token_ids[row] for row in takewhile(lambda row: row not in samples.errors, rows)]
    token_ids = known[: standing(draft, known)]
    ends = (i + 1 for i, token_id in enumerate(token_ids) if token_id in sequence.stop_ids)
    token_ids = token_ids[: next(ends, None)]
    sequence.num_pending_tokens -= 1
    sequence.token_ids[index : index + 1] = token_ids
    sequence.num_computed_tokens += max(len(token_ids) - 1, 0)
    return Landed(
        Emitted(sequence, index, len(draft), token_ids),
        tuple(samples.logprobs[row] for row in rows[: len(token_ids)] if row in samples.logprobs),
        None if token_ids else samples.errors[first_row],
    )
