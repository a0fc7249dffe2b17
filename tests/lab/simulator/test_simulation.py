"""lab.simulator.simulation: nothing gets lost, the same seed gives the same run, and sharing KV shares it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lab.simulator.kv_pool import KvSharing
from lab.simulator.simulation import Fleet, Result, Setup, simulate
from lab.simulator.trace import Arrival, Trace
from scheduler_svc.cost_model import CostModel
from scheduler_svc.policies import CHOICES, PolicyNames
from weft.messages import WorkerRole
from worker_svc.batch import Limits

COST = CostModel(overhead_s=0.01, token_s=1e-4, attention_s=1e-8, context_s=1e-6, sequence_s=1e-3)
FAST = KvSharing(bytes_per_token=1000, bytes_per_s=1e9, latency_s=1e-3)


def conversations(seed: int, count: int = 150, rate: float = 15.0) -> Trace:
    """Prompts that continue each other, in blocks of 64 tokens."""
    chance, arrivals, histories = random.Random(seed), [], [tuple(range(4)) for _ in range(12)]
    for number in range(count):
        place = chance.randrange(len(histories))
        histories[place] += tuple(1000 * (number + 1) + i for i in range(chance.randrange(1, 4)))
        num_tokens = 64 * len(histories[place]) - chance.randrange(64)
        at, output = chance.uniform(0, count / rate), chance.randrange(1, 60)
        arrivals.append(Arrival(at, num_tokens, output, histories[place], tenant=f"t{place % 3}"))
    return Trace("conversations", tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)), 64)


def setup(
    route: str = "prefix_aware",
    order: str = "fcfs",
    roles: dict[WorkerRole, int] | None = None,
    sharing: KvSharing | None = None,
    kv_tokens: int = 20_000,
) -> Setup:
    fleet = Fleet(4, COST, Limits(8, 512), kv_tokens, roles or {}, sharing)
    return Setup(fleet, PolicyNames(admit="open", route=route, order=order))


def check(result: Result, trace: Trace) -> None:
    """Every arrival has ended exactly once, with all its tokens, and all books balance."""
    assert Counter(record.request_id for record in result.records) == {f"r{i}": 1 for i in range(len(trace.arrivals))}
    for record in result.records:
        assert (record.ended_at is None) != (record.refused_at is None)
        if record.ended_at is not None:
            assert sum(count for _, count in record.gaps) == record.num_output_tokens - 1
    for worker in result.workers:
        assert not worker.num_held
        worker.pool.check(tables=[])
    result.state.check()


@pytest.mark.parametrize("route", CHOICES["route"])
def test_every_arrival_ends_once_by_every_route(route: str) -> None:
    trace = conversations(1)

    check(simulate(trace, setup(route=route)), trace)


@pytest.mark.parametrize("order", CHOICES["order"])
def test_every_arrival_ends_once_in_every_order(order: str) -> None:
    trace = conversations(2, rate=60.0)

    check(simulate(trace, setup(order=order)), trace)


@pytest.mark.parametrize("admit", CHOICES["admit"])
def test_every_arrival_is_answered_or_refused_by_every_admission(admit: str) -> None:
    trace = conversations(3, rate=60.0)
    names = PolicyNames(admit=admit)

    check(simulate(trace, Setup(Fleet(2, COST, Limits(8, 512), 20_000), names)), trace)


def test_a_scarce_memory_preempts_and_loses_nothing() -> None:
    trace = Trace("growing", tuple(Arrival(0.01 * i, 100, 600) for i in range(30)), 64)

    result = simulate(trace, setup(kv_tokens=2_500))

    assert sum(worker.num_preemptions for worker in result.workers) > 0
    check(result, trace)


def test_a_prompt_that_no_worker_holds_is_refused() -> None:
    trace = Trace("long", (Arrival(0.0, 30_000, 1),), 64)

    result = simulate(trace, setup())

    assert [record.refused_at is not None for record in result.records] == [True]


@pytest.mark.parametrize("route", ["random", "power_of_two", "min_ttft"])
def test_the_same_setup_gives_the_same_run(route: str) -> None:
    first, second = (simulate(conversations(5), setup(route=route, sharing=FAST)) for _ in range(2))

    assert first.records == second.records
    assert first.num_events == second.num_events


def test_time_to_first_token_when_idle_is_the_formula_and_the_hops() -> None:
    plan = setup()

    [record] = simulate(Trace("one", (Arrival(1.0, 300, 5),), 64), plan).records

    work = COST.overhead_s + COST.prefill_s(300)
    # Gateway, tokenizer, scheduler, worker, tokenizer, gateway.
    assert record.ttft_s == pytest.approx(work + 5 * plan.hop_s)


def test_demotion_hands_choices_back_and_all_tokens_come() -> None:
    trace = Trace("long", tuple(Arrival(0.01 * i, 100, 400) for i in range(20)), 64)

    result = simulate(trace, setup(order="mlfq"))

    assert max(len(record.workers) for record in result.records) > 1
    check(result, trace)


def test_a_split_request_goes_from_a_prefill_worker_to_a_decode_worker() -> None:
    trace = conversations(6, rate=5.0)

    result = simulate(trace, setup(route="pd_heatmap", roles={"prefill": 2, "decode": 2}))

    ways = {tuple(name.partition("-")[0] for name in record.workers) for record in result.records}
    assert ways == {("prefill",), ("prefill", "decode")}
    check(result, trace)


def test_a_split_request_takes_its_blocks_with_it_where_that_is_faster() -> None:
    trace, roles = conversations(6), {"prefill": 2, "decode": 2}
    alone = simulate(trace, setup("pd_heatmap", roles=roles))  # type: ignore[arg-type]  # keys are roles
    moved = simulate(trace, setup("pd_heatmap", roles=roles, sharing=KvSharing(1000, 0)))  # type: ignore[arg-type]

    assert sum(record.num_fetched_tokens for record in alone.records) == 0
    assert sum(record.num_fetched_tokens for record in moved.records) > 0
    assert moved.summary().e2e_mean_s < alone.summary().e2e_mean_s
    check(moved, trace)


def test_a_shared_store_finds_what_other_workers_computed() -> None:
    trace = conversations(7)
    alone = simulate(trace, setup("round_robin"))
    shared = simulate(trace, setup("round_robin", sharing=FAST))

    assert shared.summary().hit_ratio > 1.2 * alone.summary().hit_ratio
    assert sum(record.num_fetched_tokens for record in shared.records) > 0
    check(shared, trace)


def test_a_link_that_is_slower_than_computing_is_not_used() -> None:
    trace = conversations(8)
    slow = simulate(trace, setup("round_robin", sharing=KvSharing(bytes_per_token=1000, bytes_per_s=1e5)))

    num_prompt_tokens = sum(record.num_prompt_tokens for record in slow.records)
    assert sum(record.num_fetched_tokens for record in slow.records) < 0.02 * num_prompt_tokens
    check(slow, trace)
