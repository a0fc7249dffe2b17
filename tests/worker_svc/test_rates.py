"""Which steps say how fast prompts are computed and answers come, and how soon the past is forgotten."""

from __future__ import annotations

import pytest

from worker_svc.batch import Work
from worker_svc.rates import MIN_RATED_TOKENS, Rate, StepRates


def rates_of(*steps: tuple[Work, int, float]) -> StepRates:
    rates = StepRates()
    for work, num_emitted, seconds in steps:
        rates.add(work, num_emitted, seconds)
    return rates


def test_rate_is_weighed_by_amounts_and_forgets() -> None:
    rate = Rate()
    rate.add(100, 1.0)
    assert rate.per_s == 100
    rate.add(1000, 1.0)
    assert 100 < rate.per_s < 1000
    for _ in range(200):
        rate.add(10, 1.0)
    assert rate.per_s == pytest.approx(10, rel=0.01)


def test_rate_of_what_took_no_time_is_none() -> None:
    rate = Rate()
    rate.add(5, 0.0)
    assert rate.per_s == Rate().per_s == 0


def test_step_with_prompts_says_how_fast_these_are_computed_beside_its_decodes() -> None:
    rates = rates_of((Work(num_new=60, num_sequences=4), 5, 2.0))
    assert (rates.prefill.per_s, rates.decode.per_s) == (30, 0)


def test_step_of_decodes_says_how_fast_tokens_come() -> None:
    # With drafts that stand, more come than there are sequences.
    rates = rates_of((Work(num_sequences=4), 6, 2.0))
    assert (rates.prefill.per_s, rates.decode.per_s) == (0, 3)


def test_rest_of_a_cached_prompt_says_nothing_of_prompts_once_any_was_measured() -> None:
    rest = Work(num_new=MIN_RATED_TOKENS - 1)
    assert rates_of((rest, 1, 1.0)).prefill.per_s == MIN_RATED_TOKENS - 1
    rates = rates_of((Work(num_new=1000), 1, 1.0), (rest, 1, 1.0))
    assert (rates.prefill.per_s, rates.decode.per_s) == (1000, 1)


def test_seconds_of_a_step_begin_with_the_first_and_follow_slowly() -> None:
    decode = Work(num_sequences=1)
    assert StepRates().step_s == 0
    assert rates_of((decode, 1, 2.0)).step_s == 2
    assert rates_of((decode, 1, 2.0), (decode, 1, 3.0)).step_s == pytest.approx(2.1)


def test_seconds_of_a_step_are_those_that_a_decode_waits() -> None:
    rates = rates_of((Work(num_new=2000), 1, 9.0))
    assert rates.step_s == 0
    assert rates_of((Work(num_sequences=1), 1, 2.0), (Work(num_new=2000), 1, 9.0)).step_s == 2
    assert rates_of((Work(num_new=100, num_sequences=1), 1, 3.0)).step_s == 3


def test_steps_counted_in_together_are_rated_by_their_length_and_timed_by_their_mean() -> None:
    rates = StepRates()
    rates.add(Work(num_sequences=40), 40, 2.0, num_steps=10)
    assert rates.step_s == 0.2
    rates.add(Work(num_sequences=1), 1, 0.2)
    assert rates.decode.per_s == pytest.approx((0.95 * 40 + 1) / (0.95 * 2.0 + 0.2))
