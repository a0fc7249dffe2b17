"""Admission: who is refused, and what a client is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from scheduler_svc.cost_model import CostModel
from scheduler_svc.ends import End, Ends
from scheduler_svc.policy.admit import (
    ADMITS,
    AdmitContext,
    BacklogView,
    Bounded,
    EarlyReject,
    LoadView,
    Objectives,
    Open,
    PredictedReject,
    retry_after,
)
from tests.support.scheduling import make_request
from weft.errors import Overloaded

COST = CostModel(overhead_s=0.01, token_s=0.001, sequence_s=0.002)
TIGHT = {"": Objectives(ttft_s=1.0, tbt_s=0.05)}


def make_view(**changes: Any) -> BacklogView:
    empty = BacklogView(0, 0, 0, prefill_tokens_per_s=0.0, decode_tokens_per_s=0.0)
    return replace(empty, **changes)


def make_load(ends: Iterable[End] = (), **changes: Any) -> LoadView:
    idle = LoadView(make_view(), 1, 1, 0, 0, 0.0, Ends())
    for end in ends:
        idle.ends.add(end)
    return replace(idle, **changes)


def refused(policy: Any, load: LoadView, num_tokens: int = 10, **changes: Any) -> Any:
    return policy.decide(make_request(num_tokens=num_tokens, **changes), load.backlog, lambda: load)


def test_open_takes_everything() -> None:
    full = make_load(backlog=make_view(num_requests=10**9, num_tokens=10**9), num_queued_tokens=10**9)
    assert refused(Open(), full) is None


@pytest.mark.parametrize(
    ("num_requests", "num_tokens", "is_taken"),
    [(0, 0, True), (9, 50, True), (10, 0, False), (1, 90, True), (1, 91, False)],
)
def test_bounded_refuses_what_passes_a_bound(num_requests: int, num_tokens: int, is_taken: bool) -> None:
    error = refused(Bounded(10, 100), make_load(backlog=make_view(num_requests=num_requests, num_tokens=num_tokens)))
    assert (error is None) is is_taken
    assert is_taken or isinstance(error, Overloaded)


@given(st.lists(st.integers(1, 60), max_size=40))
def test_bounded_keeps_its_bounds_but_for_one_request_that_alone_is_larger(sizes: list[int]) -> None:
    policy, taken = Bounded(5, 50), list[int]()
    for size in sizes:
        backlog = make_view(num_requests=len(taken), num_tokens=sum(taken))
        if refused(policy, make_load(backlog=backlog), num_tokens=size) is None:
            taken.append(size)
    assert len(taken) <= 5
    assert sum(taken) <= 50 or len(taken) == 1


def test_bounded_takes_a_large_request_into_an_empty_backlog() -> None:
    assert refused(Bounded(1, 10), make_load(), num_tokens=1000) is None


@pytest.mark.parametrize("make", [EarlyReject, PredictedReject])
def test_early_reject_refuses_a_first_token_that_comes_too_late(make: type[EarlyReject]) -> None:
    policy = make(COST, TIGHT, Open())
    assert refused(policy, make_load(num_queued_tokens=800), num_tokens=90) is None
    # What is predicted just in time is late half of the times.
    assert refused(policy, make_load(num_queued_tokens=900), num_tokens=90) is not None
    error = refused(policy, make_load(num_queued_tokens=5000), num_tokens=100)
    assert isinstance(error, Overloaded)
    assert error.message == "a first token is expected in 5.61 s, and 1 s are promised"
    assert error.retry_after_s == pytest.approx(4.61)
    assert refused(policy, make_load(num_queued_tokens=5000, num_prefilling=10), num_tokens=100) is None


def test_queue_takes_as_long_as_workers_measure_beside_their_decodes() -> None:
    policy = EarlyReject(COST, TIGHT, Open())
    measured = {"num_queued_tokens": 800, "num_prefilling": 2}
    assert refused(policy, make_load(backlog=make_view(prefill_tokens_per_s=1000.0), **measured)) is None
    assert refused(policy, make_load(backlog=make_view(prefill_tokens_per_s=500.0), **measured)) is not None


def test_first_token_waits_for_a_place_too() -> None:
    policy = EarlyReject(COST, TIGHT, Open())
    rates = {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 100.0}
    assert refused(policy, make_load(backlog=make_view(num_requests=1, num_new_tokens=50, **rates))) is None
    assert refused(policy, make_load(backlog=make_view(num_requests=1, num_new_tokens=200, **rates))) is not None


@pytest.mark.parametrize("make", [EarlyReject, PredictedReject])
def test_what_workers_measured_last_refuses_nothing_where_nobody_runs_or_waits(make: type[EarlyReject]) -> None:
    slow, idle = CostModel(overhead_s=0.5, token_s=0.001), make_load()
    policy = make(slow, TIGHT, Open(), is_calibrated=False)
    assert refused(policy, idle, num_tokens=5000) is None
    for busy in ({"num_running": 1}, {"num_queued_tokens": 1}, {"backlog": make_view(num_requests=1)}):
        assert refused(policy, make_load(**busy), num_tokens=5000) is not None
    assert refused(make(slow, TIGHT, Open()), idle, num_tokens=5000) is not None, "a calibration is right for ever"


def test_early_reject_refuses_when_decodes_are_too_slow_now() -> None:
    policy = EarlyReject(COST, TIGHT, Open())
    assert refused(policy, make_load(num_running=18)) is None
    error = refused(policy, make_load(num_running=20))
    assert error is not None and error.message.startswith("a token after another is expected in 0.05 s")
    assert refused(policy, make_load(num_running=20, num_decoding=2)) is None
    assert refused(policy, make_load(num_running=20, num_prefilling=2)) is not None


def test_predicted_reject_counts_what_will_run_by_then() -> None:
    policy = PredictedReject(COST, TIGHT, Open())
    ending, staying = (0.5, 10), (60.0, 10)
    busy = {"num_running": 30, "num_queued_tokens": 700}
    assert refused(policy, make_load([ending] * 30, **busy)) is None
    assert refused(policy, make_load([staying] * 30, **busy)) is not None
    # What waits will have been prefilled, too.
    assert refused(policy, make_load([ending] * 30, backlog=make_view(num_requests=30), **busy)) is not None


def test_objectives_are_those_of_the_class() -> None:
    policy = EarlyReject(COST, {"priority": Objectives(ttft_s=0.1), "": Objectives(ttft_s=10.0)}, Open())
    load = make_load(num_queued_tokens=1000)
    assert refused(policy, load) is None
    assert refused(policy, load, slo_class="priority") is not None
    assert refused(policy, load, slo_class="flex") is None


@pytest.mark.parametrize("name", ["early_reject", "predicted_reject"])
def test_without_objectives_only_the_bounds_refuse(name: str) -> None:
    policy = ADMITS[name](AdmitContext(10, 100, COST, {}))
    assert refused(policy, make_load(num_queued_tokens=10**9, num_running=10**6)) is None
    assert refused(policy, make_load(backlog=make_view(num_requests=10))) is not None


def test_retry_after_is_the_time_that_the_backlog_takes() -> None:
    rates = {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 100.0}
    view = make_view(num_requests=9, num_tokens=6000, num_new_tokens=900, **rates)
    assert retry_after(view) == 15.0
    error = refused(Bounded(1, 10**9), make_load(backlog=view))
    assert error is not None and error.retry_after_s == 15.0


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1e6), st.floats(0, 1e6))
def test_retry_after_is_never_absurd(num_tokens: int, num_new: int, prefill: float, decode: float) -> None:
    rates = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
    view = make_view(num_tokens=num_tokens, num_new_tokens=num_new, **rates)
    assert 1.0 <= retry_after(view) <= 60.0
