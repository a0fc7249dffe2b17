"""Prompt lookup in an engine's hands: it rests where nothing repeats, and wakes up where something does."""

from __future__ import annotations

from tests.support.engine_requests import make_sequence
from worker_svc.sequence import Sequence
from worker_svc.speculation.prompt_lookup import LOOK_EVERY, REST_AFTER, PromptLookup
from worker_svc.speculation.speculation import Emitted, StepOutcome


def step(lookup: PromptLookup, sequence: Sequence, token_id: int) -> int:
    """One decode step that emits this token, and those of its draft that follow. Returns how many were drafted."""
    (draft,) = lookup.draft([sequence], [4], 100)
    index = len(sequence.token_ids)
    sequence.token_ids.append(token_id)
    emitted = Emitted(sequence, index, len(draft), [token_id])
    lookup.observe(StepOutcome([sequence], [emitted], is_decode=True, seconds=0.01))
    return len(draft)


def test_without_repeats_most_steps_are_not_looked_at() -> None:
    lookup, sequence = PromptLookup(4), make_sequence([1, 2, 3])
    looks = []
    for token_id in range(10, 10 + REST_AFTER + 4 * LOOK_EVERY):
        step(lookup, sequence, token_id)
        looks.append(lookup._looks)
    assert all(looks[:REST_AFTER])
    assert sum(looks[REST_AFTER:]) == 4


def test_a_text_that_begins_to_repeat_is_drafted_for_after_a_rest() -> None:
    lookup, sequence = PromptLookup(4), make_sequence([1, 2, 3])
    tale = list(range(10, 10 + 5 * REST_AFTER))
    assert not any(step(lookup, sequence, token_id) for token_id in tale)
    assert any(step(lookup, sequence, token_id) for token_id in tale)
