"""Quotas: no more than the bucket gives, and a time to come back that is true."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.openai import Call
from gateway.quota import Quotas, Reservation, TokenBucket, expected_tokens
from weft.columns import pack_u32
from weft.errors import QuotaExceeded
from weft.messages import ChatMessage, ChatPrompt, SamplingParams, TextPrompt, TokenPrompt
from weft.tenants import Tenant, Tenants

CONTEXT = 1000


def make_call(num_tokens: int, *, max_tokens: int | None = None, n: int = 1, **fields: Any) -> Call:
    given: dict[str, Any] = {
        "is_chat": False,
        "model": "m",
        "prompts": (TokenPrompt(pack_u32([1] * num_tokens)),),
        "n": n,
        "sampling": SamplingParams(max_tokens=max_tokens),
        "seed": None,
        "stop": (),
        "stream": True,
        "include_usage": False,
        "echo": False,
        "top_logprobs": None,
    }
    return Call(**(given | fields))


def make_quotas(tokens_per_minute: int = 60, burst: int | None = None) -> Quotas:
    return Quotas(Tenants({"a": Tenant(1.0, tokens_per_minute, burst)}, Tenant()))


def reserve(quotas: Quotas, call: Call, now: float) -> Reservation:
    reservation = quotas.reserve("a", call, CONTEXT, now)
    assert reservation is not None
    return reservation


def refusal(quotas: Quotas, call: Call, now: float) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        quotas.reserve("a", call, CONTEXT, now)
    return caught.value


def test_a_tenant_without_a_quota_is_never_asked() -> None:
    quotas = make_quotas()
    assert quotas.reserve("b", make_call(10**6), CONTEXT, 0.0) is None
    assert quotas.headers("b", 0.0) == {}


def test_a_call_takes_its_prompt_and_the_most_that_it_may_generate() -> None:
    text, chat = TextPrompt("x" * 9), ChatPrompt([ChatMessage("user", "é" * 4), ChatMessage("user", "")])
    assert expected_tokens(make_call(5, max_tokens=10, n=3), CONTEXT) == 35
    assert expected_tokens(make_call(5, max_tokens=10**6), CONTEXT) == 5 + CONTEXT
    assert expected_tokens(make_call(0, prompts=(text, chat)), CONTEXT) == 3 + 2
    assert expected_tokens(make_call(0), CONTEXT) == 1


def test_over_the_quota_a_call_hears_when_to_come_back_and_is_taken_then() -> None:
    quotas = make_quotas(tokens_per_minute=60)
    reserve(quotas, make_call(50), 0.0)
    error = refusal(quotas, make_call(20), 4.0)
    assert error.retry_after_s == pytest.approx(6.0)
    assert "14 are left of 60" in error.message
    refusal(quotas, make_call(20), 9.9)
    reserve(quotas, make_call(20), 10.0)


def test_what_a_call_did_not_use_comes_back_with_its_end() -> None:
    quotas = make_quotas()
    taken = reserve(quotas, make_call(10, max_tokens=50), 0.0)
    refusal(quotas, make_call(40), 0.0)
    taken.settle(15, 0.0)
    reserve(quotas, make_call(45), 0.0)


def test_what_a_call_used_beyond_its_estimate_is_paid_off_by_the_next() -> None:
    quotas = make_quotas()
    reserve(quotas, make_call(10), 0.0).settle(90, 0.0)
    assert refusal(quotas, make_call(1), 0.0).retry_after_s == pytest.approx(31.0)
    assert quotas.headers("a", 0.0)["x-ratelimit-remaining-tokens"] == "0"


def test_a_call_larger_than_the_bucket_waits_for_all_of_it() -> None:
    quotas = make_quotas(burst=30)
    reserve(quotas, make_call(1), 0.0)
    assert refusal(quotas, make_call(100), 0.0).retry_after_s == pytest.approx(1.0)
    reserve(quotas, make_call(100), 1.0)
    assert refusal(quotas, make_call(1), 1.0).retry_after_s == pytest.approx(71.0)


def test_headers_are_openais() -> None:
    quotas = make_quotas(tokens_per_minute=60, burst=100)
    reserve(quotas, make_call(90), 0.0)
    assert quotas.headers("a", 0.5) == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "10",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    assert quotas.headers("a", 60.0)["x-ratelimit-reset-tokens"] == "30s"


def test_a_clock_that_stands_still_fills_nothing() -> None:
    bucket = TokenBucket(60, 60, 10.0)
    bucket.take(60, 10.0)
    assert bucket.level(5.0) == bucket.level(10.0) == 0
    assert bucket.level(11.0) == 1


@given(
    burst=st.integers(1, 200),
    rate=st.integers(1, 6000),
    calls=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 200), st.floats(0, 1)), max_size=40),
)
def test_a_tenant_never_has_more_than_its_burst_and_its_rate(burst: int, rate: int, calls: list[Any]) -> None:
    quotas, now, used, running = make_quotas(rate, burst), 0.0, 0.0, list[tuple[Reservation, int]]()
    for pause, size, share in calls:
        now += pause
        if running and share > 0.5:
            taken, num_used = running.pop()
            taken.settle(num_used, now)
        size = min(size, burst)
        try:
            taken = reserve(quotas, make_call(size), now)
        except QuotaExceeded:
            continue
        num_used = round(size * share)
        running.append((taken, num_used))
        used += num_used
        assert used <= burst + now * rate / 60 + 1e-6
