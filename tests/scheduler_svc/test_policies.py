"""Each policy's rule, one test a sentence of its docstring."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.block_index import NO_MATCH, Match
from scheduler_svc.policy import admit
from scheduler_svc.policy.admit import ASSUMED_NEW_TOKENS, BacklogView, Bounded, Open, new_tokens, retry_after
from scheduler_svc.policy.order import Fcfs, Waiting
from scheduler_svc.policy.route import MAX_SCORES, ROUTES, LeastLoaded, PrefixAware, RoundRobin
from scheduler_svc.workers import InFlight, Worker
from tests.support.scheduling import make_request, make_status
from weft.errors import Overloaded
from weft.settings import SchedulerSettings, declared


def make_worker(
    bit: int, load: int = 0, *, last_used: int = 0, max_num_seqs: int = 64, waiting_tokens: int = 0
) -> Worker:
    name = f"w{bit}"
    status = make_status(name, num_running=load, max_num_seqs=max_num_seqs, num_waiting_tokens=waiting_tokens)
    worker = Worker(name, bit, status, 0.0, last_used=last_used)
    worker.refresh(1)
    return worker


def make_view(**changes: float) -> BacklogView:
    empty = BacklogView(0, 0, 0, prefill_tokens_per_s=0.0, decode_tokens_per_s=0.0)
    return dataclasses.replace(empty, **changes)  # type: ignore[arg-type]  # counts are whole


def test_least_loaded_measures_load_by_size() -> None:
    candidates = [make_worker(0, 10, max_num_seqs=64), make_worker(1, 3, max_num_seqs=8)]
    assert LeastLoaded().decide(candidates, NO_MATCH, 0).worker == "w0"


def test_least_loaded_prefers_fewer_waiting_tokens_then_the_longest_unused() -> None:
    candidates = [make_worker(0, 1, waiting_tokens=9), make_worker(1, 1, last_used=5), make_worker(2, 1, last_used=4)]
    assert LeastLoaded().decide(candidates, NO_MATCH, 0).worker == "w2"


def test_round_robin_takes_all_before_one_gets_a_second() -> None:
    workers = [make_worker(bit, load=bit) for bit in range(3)]
    chosen = []
    for number in range(1, 7):
        name = RoundRobin().decide(workers, NO_MATCH, 0).worker
        chosen.append(name)
        workers[int(name[1:])].send(InFlight(make_request(f"r{number}"), number, 0.0), number)
    assert chosen == ["w0", "w1", "w2"] * 2


def test_prefix_aware_follows_the_longest_match() -> None:
    candidates = [make_worker(0, 0), make_worker(1, 10), make_worker(2, 9)]
    decision = PrefixAware().decide(candidates, Match(((2, 0b111), (4, 0b110))), 10)
    assert (decision.worker, decision.rule) == ("w2", "longest match")


def test_prefix_aware_does_not_follow_a_short_match() -> None:
    candidates = [make_worker(0, 0), make_worker(1, 10)]
    decision = PrefixAware().decide(candidates, Match(((2, 0b10),)), 10)
    assert (decision.worker, decision.rule) == ("w0", "short match")


def test_prefix_aware_does_not_pile_up_load() -> None:
    candidates = [make_worker(0, 0), make_worker(1, 17)]
    decision = PrefixAware().decide(candidates, Match(((10, 0b10),)), 10)
    assert (decision.worker, decision.rule) == ("w0", "unbalanced")
    busy = [make_worker(0, 40), make_worker(1, 57)]
    assert PrefixAware().decide(busy, Match(((10, 0b10),)), 10).worker == "w1"


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 6)), min_size=1, max_size=20), st.sampled_from(sorted(ROUTES))
)
def test_decision_is_for_a_candidate_and_lists_it_first(shape: list[tuple[int, int]], name: str) -> None:
    candidates = [make_worker(bit, load) for bit, (load, _) in enumerate(shape)]
    depths = sorted({depth for _, depth in shape if depth})
    match = Match(
        tuple((depth, sum(1 << bit for bit, (_, held) in enumerate(shape) if held >= depth)) for depth in depths)
    )
    decision = ROUTES[name]().decide(candidates, match, 6)
    assert decision.scores[0].worker == decision.worker
    assert decision.num_candidates == len(candidates)
    assert len(decision.scores) == min(MAX_SCORES, len(candidates))
    assert len({score.worker for score in decision.scores}) == len(decision.scores)
    by_name = {worker.name: bit for bit, worker in enumerate(candidates)}
    assert by_name[decision.worker] in range(len(candidates))
    for score in decision.scores:
        assert score.matched_blocks == shape[by_name[score.worker]][1]
    if name == "prefix_aware" and decision.rule == "longest match":
        assert decision.scores[0].matched_blocks == max(depth for _, depth in shape)


def test_open_takes_everything() -> None:
    assert Open().decide(make_request(), make_view(num_requests=10**9, num_tokens=10**9)) is None


@pytest.mark.parametrize(
    ("num_requests", "num_tokens", "is_taken"),
    [(0, 0, True), (9, 50, True), (10, 0, False), (1, 90, True), (1, 91, False)],
)
def test_bounded_refuses_what_passes_a_bound(num_requests: int, num_tokens: int, is_taken: bool) -> None:
    view = make_view(num_requests=num_requests, num_tokens=num_tokens)
    error = Bounded(10, 100).decide(make_request(num_tokens=10), view)
    assert (error is None) is is_taken
    assert is_taken or isinstance(error, Overloaded)


def test_bounded_takes_a_large_request_into_an_empty_backlog() -> None:
    assert Bounded(1, 10).decide(make_request(num_tokens=1000), make_view()) is None


def test_retry_after_is_the_time_that_the_backlog_takes() -> None:
    rates = {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 100.0}
    view = make_view(num_requests=9, num_tokens=6000, num_new_tokens=900, **rates)
    assert retry_after(view) == 15.0
    error = Bounded(1, 10**9).decide(make_request(), view)
    assert error is not None and error.retry_after_s == 15.0


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1e6), st.floats(0, 1e6))
def test_retry_after_is_never_absurd(num_tokens: int, num_new: int, prefill: float, decode: float) -> None:
    rates = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
    view = make_view(num_tokens=num_tokens, num_new_tokens=num_new, **rates)
    assert 1.0 <= retry_after(view) <= 60.0


def test_new_tokens_are_what_is_asked_for_or_assumed() -> None:
    assert new_tokens(make_request(num_choices=2, max_tokens=10)) == 20
    assert new_tokens(make_request()) == ASSUMED_NEW_TOKENS


def test_fcfs_serves_in_order_of_arrival_and_streams_that_had_begun_first() -> None:
    order = Fcfs()
    for ticket, epoch in enumerate((0, 0, 1, 0, 2)):
        order.add(Waiting(make_request(f"r{ticket}", epoch=epoch), ticket, 0.0), 0.0)
    order.remove("r1")
    served = []
    while (head := order.head(0.0)) is not None:
        served.append(head.ticket)
        order.remove(head.request.request_id)
    assert served == [2, 4, 0, 3]


def test_settings_name_the_policies_there_are() -> None:
    choices = {item.name: set(item.metadata["choices"]) for item in declared(SchedulerSettings)}
    assert choices["route"] == set(ROUTES)
    assert choices["order"] == {"fcfs"}
    assert all(admit.make(name, 1, 1).name == name for name in choices["admit"])
