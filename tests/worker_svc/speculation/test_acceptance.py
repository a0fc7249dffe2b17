import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_svc.speculation.acceptance import AcceptanceRates, Draft, SequenceAcceptance

LEAST = 0.001


def draft_of(grades: list[int]) -> Draft:
    return Draft([0] * len(grades), grades)


def chance(sequence: SequenceAcceptance, grade: int = 0) -> float:
    (only,) = sequence.chances([grade], LEAST)
    return only


def see(sequence: SequenceAcceptance, share: float, count: int, grade: int = 0, seed: int = 0) -> None:
    """Let the sequence learn of `count` tokens of which `share` were right."""
    rng = random.Random(seed)
    for _ in range(count):
        sequence.observe(draft_of([grade]), [int(rng.random() >= share)])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_chance_is_the_share_that_was_accepted(share: float) -> None:
    rates = AcceptanceRates([0.5] * 2)
    for i in range(20):
        see(SequenceAcceptance(rates), share, 25, grade=1, seed=i)
    # Fifty remembered tokens are off by 0.07 (one standard deviation) at worst.
    assert abs(chance(SequenceAcceptance(rates), 1) - share) < 0.25
    assert chance(SequenceAcceptance(rates), 0) == 0.5, "of a grade that nobody saw nothing else is believed"


def test_text_that_changes_is_noticed_within_a_few_tokens() -> None:
    rates = AcceptanceRates([0.5] * 1)
    sequence = SequenceAcceptance(rates)
    see(sequence, 0.0, 100)
    assert chance(sequence) < 0.1
    see(sequence, 1.0, 20)
    assert chance(sequence) > 0.7


def test_sequence_that_copies_does_not_make_another_look_as_if_it_did() -> None:
    rates = AcceptanceRates([0.5] * 1)
    copying, other = SequenceAcceptance(rates), SequenceAcceptance(rates)
    for _ in range(200):
        see(copying, 1.0, 1)
        see(other, 0.0, 1)
    assert chance(copying) > 0.8 and chance(other) < 0.2


@given(st.lists(st.booleans(), max_size=60), st.lists(st.integers(0, 3), max_size=12), st.floats(0.01, 1))
def test_chances_fall_and_end_at_the_least(seen: list[bool], grades: list[int], least: float) -> None:
    sequence = SequenceAcceptance(AcceptanceRates([0.5] * 4))
    for i, is_right in enumerate(seen):
        sequence.observe(draft_of([i % 4]), [0 if is_right else 1])
    chances, all_chances = sequence.chances(grades, least), sequence.chances(grades, 1e-300)
    assert len(all_chances) == len(grades) and all(0 < chance < 1 for chance in all_chances)
    assert all_chances == sorted(all_chances, reverse=True)
    assert chances == [chance for chance in all_chances if chance >= least]


def test_tokens_after_the_first_wrong_one_say_nothing() -> None:
    one, other = SequenceAcceptance(AcceptanceRates([0.5] * 3)), SequenceAcceptance(AcceptanceRates([0.5] * 3))
    one.observe(Draft([5, 6, 7], [0, 1, 2]), [5, 9, 7])
    other.observe(Draft([5, 6], [0, 1]), [5, 9])
    assert one.chances([0, 1, 2], LEAST) == other.chances([0, 1, 2], LEAST)
    assert chance(one, 1) < 0.5 < chance(one, 0)


def test_tokens_beyond_those_that_came_say_nothing() -> None:
    sequence = SequenceAcceptance(AcceptanceRates([0.5] * 1))
    sequence.observe(draft_of([0, 0, 0]), [])
    assert chance(sequence) == 0.5
