"""Predictions: what they learn, and how they fail."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.policy.predict import (
    ASSUMED_NEW_TOKENS,
    BUCKET_TOKENS,
    MIN_LEARNT,
    PREDICTORS,
    Bucket,
    MeanLength,
    NoPrediction,
    Oracle,
    PredictPolicy,
)
from tests.support.scheduling import make_request


def learn(policy: PredictPolicy, lengths: list[int], tenant: str = "", num_prompt_tokens: int = 10) -> None:
    for length in lengths:
        policy.learn(tenant, num_prompt_tokens, length)


def test_without_prediction_a_request_is_what_it_asks_for() -> None:
    policy = NoPrediction()
    learn(policy, [5] * 50)
    assert policy.remaining(make_request(max_tokens=40), 10) == 30
    assert policy.remaining(make_request()) == ASSUMED_NEW_TOKENS


def test_mean_is_that_of_all_requests() -> None:
    policy = MeanLength()
    learn(policy, [100, 300] * 20)
    assert policy.remaining(make_request()) == pytest.approx(200, rel=0.02)


def test_bucket_tells_tenants_and_prompt_lengths_apart() -> None:
    policy = Bucket()
    learn(policy, [30] * 20, "chat", 100)
    learn(policy, [900] * 20, "chat", 3000)
    learn(policy, [400] * 20, "code", 100)
    assert policy.remaining(make_request(num_tokens=100, tenant="chat")) == pytest.approx(30)
    assert policy.remaining(make_request(num_tokens=3500, tenant="chat")) == pytest.approx(900)
    assert policy.remaining(make_request(num_tokens=100, tenant="code")) == pytest.approx(400)
    # Nobody knows this tenant, so it is taken for one with prompts like these.
    assert policy.remaining(make_request(num_tokens=3500, tenant="new")) == pytest.approx(900)


def test_bucket_expects_more_of_what_goes_on_beyond_its_mean() -> None:
    policy = Bucket()
    learn(policy, [50, 50, 50, 1000] * 10)
    assert policy.remaining(make_request(), 0) < 400
    assert policy.remaining(make_request(), 200) == pytest.approx(800)
    assert policy.remaining(make_request(), 5000) == BUCKET_TOKENS


def test_bucket_follows_a_change() -> None:
    policy = Bucket()
    learn(policy, [100] * 500)
    learn(policy, [700] * 1000)
    assert policy.remaining(make_request()) == pytest.approx(700, rel=0.1)


def test_accuracy_is_counted_before_it_is_learnt() -> None:
    policy = Bucket()
    learn(policy, [10] * 100)
    # The first ones were taken for what nobody knows anything of.
    assert policy.accuracy.num_ended == 100
    assert policy.accuracy.same_bucket == pytest.approx((100 - MIN_LEARNT) / 100)
    assert policy.accuracy.mean_error < 30


def test_bucket_is_right_more_often_than_the_mean_where_kinds_differ() -> None:
    rng, bucket, mean = random.Random(1), Bucket(), MeanLength()
    for _ in range(1000):
        kind = rng.randrange(3)
        prompt, output = (100, 3000, 20_000)[kind], max(1, round(rng.gauss((40, 500, 1200)[kind], 20)))
        for policy in (bucket, mean):
            policy.learn("t", prompt, output)
    assert bucket.accuracy.same_bucket > 0.85 > mean.accuracy.same_bucket + 0.3


def test_oracle_knows() -> None:
    assert Oracle({"r0": 70}).remaining(make_request("r0"), 50) == 20


@given(
    st.sampled_from(sorted(PREDICTORS)),
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(0, 5000)), max_size=40),
    st.integers(0, 6000),
    st.one_of(st.none(), st.integers(0, 4000)),
)
def test_predictions_are_positive_and_within_what_is_allowed(
    name: str, seen: list[tuple[int, int]], num_generated: int, max_tokens: int | None
) -> None:
    policy = PREDICTORS[name]()
    for prompt, output in seen:
        policy.learn("t", prompt, output)
    remaining = policy.remaining(make_request(num_tokens=500, max_tokens=max_tokens, tenant="t"), num_generated)
    assert remaining >= 1
    if max_tokens is not None:
        assert remaining <= max(1, max_tokens - num_generated)
