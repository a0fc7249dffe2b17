"""How many workers: within the limits, to zero and from zero, and without flapping."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.policy.scale import (
    HIGH,
    HORIZON_S,
    LOW,
    SCALES,
    SHRINK_AFTER_S,
    TOKENS_PER_WORKER,
    Band,
    Fixed,
    Holt,
    Loss,
    Predictive,
    Queue,
    ScaleLimits,
    ScalePolicy,
    ScaleView,
    Slo,
    order_by_loss,
)
from weft.errors import SettingsError

LIMITS = ScaleLimits(0, 8, idle_s=10.0)
NUMBERS = st.integers(0, 200)
RATES = st.sampled_from([0.0, 0.5, 100.0])
VIEWS = st.builds(
    ScaleView,
    now=st.just(0.0),
    num_ready=st.integers(0, 9),
    num_starting=st.integers(0, 2),
    num_waiting=NUMBERS,
    num_waiting_tokens=st.integers(0, 100_000),
    num_running=NUMBERS,
    num_arrived=NUMBERS,
    max_num_seqs=st.sampled_from([0, 1, 64]),
    prefill_tokens_per_s=RATES,
    requests_per_s=RATES,
)


def at(now: float, **known: Any) -> ScaleView:
    return ScaleView(now, **({"max_num_seqs": 10} | known))


def targets(policy: ScalePolicy, views: list[ScaleView]) -> list[int]:
    return [policy.decide(view).num_workers for view in views]


@pytest.mark.parametrize("name", SCALES)
@given(views=st.lists(st.tuples(st.floats(0.0, 40.0), VIEWS), max_size=20), low=st.integers(0, 3))
def test_target_is_within_the_limits_and_never_none_while_something_waits(
    name: str, views: list[tuple[float, ScaleView]], low: int
) -> None:
    policy, now = SCALES[name](ScaleLimits(low, 5, idle_s=10.0)), 0.0
    for elapsed, view in views:
        now += elapsed
        target = policy.decide(ScaleView(**{field: getattr(view, field) for field in view.__slots__} | {"now": now}))
        assert low <= target.num_workers <= 5
        assert target.num_workers or not (view.num_waiting or view.num_running)
        assert target.reason


@pytest.mark.parametrize("name", SCALES)
def test_every_policy_starts_from_zero_at_the_first_request_and_ends_after_the_idle_time(name: str) -> None:
    policy = SCALES[name](LIMITS)
    assert policy.decide(at(0.0)).num_workers == 0
    assert policy.decide(at(1.0, num_waiting=1, num_arrived=1)).num_workers >= 1
    assert policy.decide(at(10.0, num_ready=1, num_arrived=1)).num_workers >= 1
    assert policy.decide(at(12.0, num_ready=1, num_arrived=1)).num_workers == 0
    assert policy.decide(at(13.0, num_ready=1, num_arrived=1)).num_workers == 0


@pytest.mark.parametrize("name", SCALES)
def test_a_minimum_stays_however_long_nothing_comes(name: str) -> None:
    policy = SCALES[name](ScaleLimits(2, 2, idle_s=1.0))
    assert targets(policy, [at(float(second)) for second in range(100)]) == [2] * 100


@given(st.lists(st.tuples(st.floats(0.1, 100.0), st.floats(LOW, HIGH)), min_size=2, max_size=50), st.integers(1, 6))
def test_a_need_within_the_band_never_turns_the_target_round(steps: list[tuple[float, float]], base: int) -> None:
    band, now, seen = Band(ScaleLimits(0, 100)), 0.0, []
    for elapsed, share in steps:
        now += elapsed
        seen.append(band.settle(at(now, num_running=1), base * share, "load").num_workers)
    changes = [b - a for a, b in zip(seen, seen[1:], strict=False) if a != b]
    assert all(change > 0 for change in changes) or all(change < 0 for change in changes)


def test_workers_go_only_when_fewer_would_have_done_for_a_while() -> None:
    policy = Queue(LIMITS)
    assert policy.decide(at(0.0, num_running=40)).num_workers == 5
    quiet = [policy.decide(at(second, num_running=10)).num_workers for second in (1.0, 20.0, SHRINK_AFTER_S)]
    assert quiet == [5, 5, 5]
    assert policy.decide(at(1.0 + SHRINK_AFTER_S, num_running=10)).num_workers == 2


def test_a_short_rise_begins_the_wait_before_shrinking_anew() -> None:
    policy = Queue(LIMITS)
    loads = [(0.0, 40), (1.0, 10), (20.0, 30), (21.0, 10), (40.0, 10), (51.0, 10)]
    assert targets(policy, [at(now, num_running=load) for now, load in loads]) == [5, 5, 5, 5, 5, 2]


def test_queue_grows_by_tokens_as_well_as_by_requests() -> None:
    assert Queue(LIMITS).decide(at(0.0, num_waiting=1, num_waiting_tokens=2 * TOKENS_PER_WORKER)).num_workers == 3
    assert Queue(LIMITS).decide(at(0.0, num_waiting=20)).num_workers == 3


def test_fixed_is_all_or_nothing() -> None:
    policy = Fixed(LIMITS)
    assert targets(policy, [at(0.0), at(1.0, num_waiting=1), at(5.0, num_ready=8), at(20.0, num_ready=8)]) == [
        0,
        8,
        8,
        0,
    ]


def test_slo_grows_until_the_predicted_ttft_is_within_the_objective() -> None:
    known = {"prefill_tokens_per_s": 1000.0, "num_ready": 1, "num_waiting": 1}
    found = [
        Slo(LIMITS).decide(at(0.0, ttft_s=ttft_s, num_waiting_tokens=2400, **known)) for ttft_s in (4.0, 2.0, 1.0, 0.5)
    ]
    assert [target.num_workers for target in found] == [1, 2, 3, 6]
    assert found[2].reason.startswith("TTFT 2.40 s predicted, 1 s promised")


def test_slo_counts_the_wait_for_a_place_too() -> None:
    full = at(0.0, ttft_s=1.0, num_waiting=8, num_running=10, num_ready=1, prefill_tokens_per_s=1e6, requests_per_s=4.0)
    assert Slo(LIMITS).decide(full).num_workers == 3


def test_predictive_has_workers_before_they_are_needed() -> None:
    policy, queue, arrived, seen = Predictive(LIMITS), Queue(LIMITS), 0, []
    for second in range(60):
        arrived += second // 2
        view = at(float(second), num_arrived=arrived, num_running=min(second // 4, 10), requests_per_s=10.0)
        seen.append((policy.decide(view).num_workers, queue.decide(view).num_workers))
    assert seen[-1][0] > seen[-1][1] >= 1


def test_holts_forecast_of_a_constant_rate_is_that_rate() -> None:
    holt = Holt()
    for second in range(200):
        holt.observe(7 * second, float(second))
    assert holt.forecast(HORIZON_S) == pytest.approx(7.0, abs=0.05)


def test_holts_forecast_follows_a_straight_line() -> None:
    holt, arrived = Holt(), 0
    for second in range(300):
        arrived += second
        holt.observe(arrived, float(second))
    assert holt.forecast(10.0) == pytest.approx(309.0, rel=0.05)


def test_the_worker_whose_loss_costs_least_goes_first() -> None:
    losses = [Loss("a", 2, 0), Loss("b", 0, 50), Loss("c", 0, 7), Loss("d", 0, 7)]
    assert order_by_loss(losses) == ["c", "d", "b", "a"]


def test_bounds_without_a_number_between_them_are_refused() -> None:
    with pytest.raises(SettingsError, match="min_workers: 3 is more than max_workers, 2"):
        ScaleLimits(3, 2)
