"""Predictions: what they learn, and how they fail."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.policy.predict import (
    ASSUMED_NEW_TOKENS,
    BUCKET_TOKENS,
    MAX_KINDS,
    MIN_LEARNT,
    PREDICTORS,
    Bucket,
    MeanLength,
    NoPrediction,
    Oracle,
    PredictPolicy,
)
from tests.support.scheduling import make_request
from weft.messages import TokenizedRequest


def learn(policy: PredictPolicy, lengths: list[int], tenant: str = "", num_prompt_tokens: int = 10) -> None:
    for length in lengths:
        policy.learn(tenant, num_prompt_tokens, length)


def remaining(policy: PredictPolicy, request: TokenizedRequest, num_generated: int = 0) -> float:
    return policy.guess(request, num_generated).remaining


def test_without_prediction_a_request_is_what_it_asks_for() -> None:
    policy = NoPrediction()
    learn(policy, [5] * 50)
    assert remaining(policy, make_request(max_tokens=40), 10) == 30
    assert remaining(policy, make_request()) == ASSUMED_NEW_TOKENS


def test_mean_is_that_of_all_requests() -> None:
    policy = MeanLength()
    learn(policy, [100, 300] * 20)
    assert remaining(policy, make_request()) == pytest.approx(200, rel=0.02)


def test_bucket_tells_tenants_and_prompt_lengths_apart() -> None:
    policy = Bucket()
    learn(policy, [30] * 20, "chat", 100)
    learn(policy, [900] * 20, "chat", 3000)
    learn(policy, [400] * 20, "code", 100)
    assert remaining(policy, make_request(num_tokens=100, tenant="chat")) == pytest.approx(30)
    assert remaining(policy, make_request(num_tokens=3500, tenant="chat")) == pytest.approx(900)
    assert remaining(policy, make_request(num_tokens=100, tenant="code")) == pytest.approx(400)
    # Nobody knows this tenant, so it is taken for one with prompts like these.
    assert remaining(policy, make_request(num_tokens=3500, tenant="new")) == pytest.approx(900)


def test_bucket_expects_more_of_what_goes_on_beyond_its_mean() -> None:
    policy = Bucket()
    learn(policy, [50, 50, 50, 1000] * 10)
    assert remaining(policy, make_request(), 0) < 400
    assert remaining(policy, make_request(), 200) == pytest.approx(800)
    assert remaining(policy, make_request(), 5000) == BUCKET_TOKENS


def test_bucket_follows_a_change() -> None:
    policy = Bucket()
    learn(policy, [100] * 500)
    learn(policy, [700] * 50)
    assert remaining(policy, make_request()) == pytest.approx(700, rel=0.1)


# Tokens of prompts, and of answers, of two kinds; nine of ten requests are of the first.
SHORT, LONG = (100, 40), (700, 800)


def heavy_tailed(chance: random.Random, mean: int) -> int:
    return max(1, min(4000, round(chance.lognormvariate(math.log(mean) - 0.72, 1.2))))


def test_a_kind_that_is_right_is_hardly_taken_for_the_mean() -> None:
    policy, chance = Bucket(), random.Random(1)
    for _ in range(1000):
        prompt, answer = SHORT if chance.random() < 0.9 else LONG
        policy.learn("", prompt, answer)
    for prompt, answer in (SHORT, LONG):
        assert remaining(policy, make_request(num_tokens=prompt)) == pytest.approx(answer, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_after_a_turn_a_kind_is_soon_no_further_off_than_the_mean(seed: int) -> None:
    bucket, mean, chance = Bucket(), MeanLength(), random.Random(seed)
    for _ in range(1000):
        prompt, answer = SHORT if chance.random() < 0.9 else LONG
        for policy in (bucket, mean):
            policy.learn("", prompt, answer)
    for prompt, answer in ((SHORT[0], LONG[1]), (LONG[0], SHORT[1])):
        for _ in range(40):
            for policy in (bucket, mean):
                policy.learn("", prompt, answer)
        request = make_request(num_tokens=prompt)
        assert abs(remaining(bucket, request) - answer) <= abs(remaining(mean, request) - answer)


def test_kinds_that_say_nothing_fade_out() -> None:
    bucket, mean, chance, errors = Bucket(), MeanLength(), random.Random(2), [0.0, 0.0]
    for i in range(4000):
        prompt, answer = chance.choice([100, 700, 3000]), heavy_tailed(chance, 200)
        for number, policy in enumerate((bucket, mean)):
            if i > 500:
                errors[number] += (remaining(policy, make_request(num_tokens=prompt)) - answer) ** 2
            policy.learn("", prompt, answer)
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize(("period", "most"), [(10, 1.01), (200, 0.5)])
def test_kinds_that_turn_too_often_are_no_worse_than_the_mean_and_slower_ones_are_followed(
    period: int, most: float
) -> None:
    bucket, mean, chance, errors = Bucket(), MeanLength(), random.Random(3), [0.0, 0.0]
    for i in range(4000):
        prompt, answer = chance.choice([SHORT, LONG])
        if i // period % 2:
            prompt = SHORT[0] + LONG[0] - prompt
        for number, policy in enumerate((bucket, mean)):
            errors[number] += (remaining(policy, make_request(num_tokens=prompt)) - answer) ** 2
            policy.learn("", prompt, answer)
    assert errors[0] < most * errors[1]


def test_what_was_guessed_when_it_mattered_is_judged() -> None:
    policy = Bucket()
    for _ in range(50):
        policy.learn("", *SHORT)
        policy.learn("", *LONG)
    before = policy.guess(make_request(num_tokens=SHORT[0]))
    learn(policy, [LONG[1]] * 50, num_prompt_tokens=SHORT[0])
    learn(policy, [SHORT[1]] * 50, num_prompt_tokens=LONG[0])
    now, error = policy.guess(make_request(num_tokens=SHORT[0])), policy.accuracy.sum_error
    for _ in range(50):
        policy.learn("", SHORT[0], LONG[1], before)
    assert policy.accuracy.sum_error - error == pytest.approx(50 * (LONG[1] - before.whole))
    # All these requests have turned out as would be guessed now, and yet nobody could have used it.
    later = policy.guess(make_request(num_tokens=SHORT[0]))
    assert later.of_kind >= now.of_kind and later.whole - later.of_all < 0.9 * (later.of_kind - later.of_all)


def test_a_tenant_that_lies_costs_others_no_accuracy() -> None:
    policy, chance = Bucket(), random.Random(4)
    for i in range(4000):
        prompt, answer = SHORT if chance.random() < 0.9 else LONG
        policy.learn("honest", prompt, answer)
        if i % 10 == 0:
            # Short ones until it is believed, then long ones.
            policy.learn("liar", SHORT[0], 5 if i // 200 % 2 else 3000)
    for prompt, answer in (SHORT, LONG):
        assert remaining(policy, make_request(num_tokens=prompt, tenant="honest")) == pytest.approx(answer, rel=0.05)


def test_no_more_than_so_many_kinds_are_remembered() -> None:
    policy = Bucket()
    learn(policy, [900] * 20, "seldom")
    assert remaining(policy, make_request(tenant="seldom")) == pytest.approx(900)
    for number in range(MAX_KINDS):
        policy.learn(f"t{number}", 10, 30)
    assert remaining(policy, make_request(tenant="seldom")) == pytest.approx(30, rel=0.1)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3000), st.integers(0, 3000)), max_size=60))
def test_equal_histories_give_equal_predictions(seen: list[tuple[str, int, int]]) -> None:
    one, other = Bucket(), Bucket()
    for policy in (one, other):
        for tenant, prompt, answer in seen:
            policy.learn(tenant, prompt, answer)
            if policy is one:
                remaining(policy, make_request(num_tokens=700, tenant="b"), 50)
    for tenant, prompt in (("a", 100), ("b", 700), ("new", 100)):
        request = make_request(num_tokens=prompt, tenant=tenant)
        assert remaining(one, request, 10) == remaining(other, request, 10)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3000)), max_size=80), st.integers(0, 2000))
def test_a_prediction_lies_between_the_lengths_of_its_kind_and_the_mean(
    seen: list[tuple[bool, int]], num_generated: int
) -> None:
    """The kind ends at one length always, so that what it says is known."""
    bucket, mean = Bucket(), MeanLength()
    for is_other, answer in [*seen, *[(False, 0)] * MIN_LEARNT]:
        prompt, length = (5000, answer) if is_other else (100, 640)
        for policy in (bucket, mean):
            policy.learn("", prompt, length)
    request = make_request(num_tokens=100)
    said = 640 - num_generated if num_generated < 640 else BUCKET_TOKENS
    least, most = sorted((said, remaining(mean, request, num_generated)))
    assert least - 1e-6 <= remaining(bucket, request, num_generated) <= most + 1e-6


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
    assert remaining(Oracle({"r0": 70}), make_request("r0"), 50) == 20


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
    found = remaining(policy, make_request(num_tokens=500, max_tokens=max_tokens, tenant="t"), num_generated)
    assert found >= 1
    if max_tokens is not None:
        assert found <= max(1, max_tokens - num_generated)
