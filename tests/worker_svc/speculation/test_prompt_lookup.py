"""Prompt lookup in an engine's hands: it rests where nothing repeats, and wakes up where something does."""

from __future__ import annotations

from tests.support.engine_requests import make_sequence
from worker_svc.sequence import Sequence
from worker_svc.speculation.prompt_lookup import LOOK_EVERY, REST_AFTER, PromptLookup
from worker_svc.speculation.speculation import Emitted, StepOutcome


def step(lookup: PromptLookup, sequence: Sequence, token_id: int) -> int:
    """One decode step that emits this token and none of its draft. Returns how many were drafted."""
    rests = lookup.rests()
    (draft,) = [()] if rests else lookup.draft([sequence], [4], 100)
    index = len(sequence.token_ids)
    sequence.token_ids.append(token_id)
    emitted = Emitted(sequence, index, len(draft), [token_id])
    if not rests:
        lookup.observe(StepOutcome([sequence], [emitted], is_decode=True, seconds=0.01))
    return len(draft)


def test_without_repeats_most_steps_are_not_looked_at() -> None:
    lookup = PromptLookup(4)
    looks = [not lookup.rests() for _ in range(REST_AFTER + 4 * LOOK_EVERY)]
    assert all(looks[:REST_AFTER])
    assert sum(looks[REST_AFTER:]) == 4


def test_a_draft_that_does_not_stand_is_no_reason_to_look_more_often() -> None:
    lookup, sequence = PromptLookup(4), make_sequence([1, 2, 3] * 20)
    assert sum(step(lookup, sequence, 1 + i % 3) for i in range(REST_AFTER)) > 0
    assert sum(not lookup.rests() for _ in range(8 * LOOK_EVERY)) == 8


def test_a_drafted_token_that_stands_is() -> None:
    lookup, sequence = PromptLookup(4), make_sequence([1, 2, 3])
    while not lookup.rests():
        pass
    sequence.token_ids += [5, 6]
    lookup.observe(StepOutcome([sequence], [Emitted(sequence, 3, 1, [5, 6])], is_decode=True, seconds=0.01))
    assert not any(lookup.rests() for _ in range(REST_AFTER))


def test_a_text_that_begins_to_repeat_is_drafted_for_after_a_rest() -> None:
    lookup, sequence = PromptLookup(4), make_sequence([1, 2, 3])
    tale = list(range(10, 10 + 5 * REST_AFTER))
    assert not any(step(lookup, sequence, token_id) for token_id in tale)
    assert any(step(lookup, sequence, token_id) for token_id in tale)
