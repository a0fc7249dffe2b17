"""Routes: each rule, and what all decisions have in common."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.block_index import Match
from scheduler_svc.cost_model import CostModel, Transfer
from scheduler_svc.policy.route import (
    ASSUMED_HEATMAP,
    ROUTES,
    Arrival,
    LeastLoaded,
    LeastPrefill,
    MinTtft,
    PdHeatmap,
    PowerOfTwo,
    PrebleE2,
    PrefixAware,
    Random,
    RoundRobin,
    RouteContext,
    RoutePolicy,
    heatmap_cell,
)
from scheduler_svc.pool import Pool
from scheduler_svc.workers import Worker
from tests.support.scheduling import make_flight, make_request, make_worker
from weft.hashing import BLOCK_SIZE
from weft.limits import MAX_SCORES
from weft.messages import Decision

COST = CostModel(overhead_s=0.01, token_s=0.001)


def make_arrival(levels: tuple[tuple[int, int], ...] = (), num_blocks: int = 10, **changes: object) -> Arrival:
    known = {"num_tokens": num_blocks * BLOCK_SIZE, "num_blocks": num_blocks, "remaining": 100.0, "now": 0.0}
    return Arrival(**known | {"match": Match(levels)} | changes)  # type: ignore[arg-type]  # named by their fields


def decide(policy: RoutePolicy, workers: list[Worker], arrival: Arrival | None = None) -> Decision:
    return policy.decide(arrival or make_arrival(), Pool(workers))


def test_least_loaded_measures_load_by_size() -> None:
    assert decide(LeastLoaded(), [make_worker(0, 10), make_worker(1, 3, max_num_seqs=8)]).worker == "w0"


def test_least_loaded_prefers_fewer_waiting_tokens_then_the_longest_unused() -> None:
    workers = [make_worker(0, 1, waiting_tokens=9), make_worker(1, 1, last_used=5), make_worker(2, 1, last_used=4)]
    assert decide(LeastLoaded(), workers).worker == "w2"


def test_round_robin_takes_all_before_one_gets_a_second() -> None:
    workers = [make_worker(bit, load=bit) for bit in range(3)]
    chosen = []
    for number in range(1, 7):
        name = decide(RoundRobin(), workers).worker
        chosen.append(name)
        worker = workers[int(name[1:])]
        worker.send(make_flight(make_request(f"r{number}"), number), number)
        worker.refresh(1)
    assert chosen == ["w0", "w1", "w2"] * 2


def test_random_takes_each_as_often() -> None:
    policy, workers = Random(random.Random(1)), [make_worker(bit, load=bit) for bit in range(4)]
    names = [decide(policy, workers).worker for _ in range(2000)]
    assert all(400 < names.count(f"w{bit}") < 600 for bit in range(4))


def test_power_of_two_never_takes_the_most_loaded_and_seldom_the_next() -> None:
    policy, workers = PowerOfTwo(random.Random(1)), [make_worker(bit, load=bit) for bit in range(4)]
    names = [decide(policy, workers).worker for _ in range(3000)]
    assert names.count("w3") == 0
    assert [round(names.count(f"w{bit}") / 500) for bit in range(3)] == [3, 2, 1]


def test_prefix_aware_follows_the_longest_match() -> None:
    workers = [make_worker(0, 0), make_worker(1, 10), make_worker(2, 9)]
    decision = decide(PrefixAware(), workers, make_arrival(((2, 0b111), (4, 0b110))))
    assert (decision.worker, decision.rule) == ("w2", "longest match")


def test_prefix_aware_does_not_follow_a_short_match() -> None:
    decision = decide(PrefixAware(), [make_worker(0, 0), make_worker(1, 10)], make_arrival(((2, 0b10),)))
    assert (decision.worker, decision.rule) == ("w0", "short match")


def test_prefix_aware_does_not_pile_up_load() -> None:
    arrival = make_arrival(((10, 0b10),))
    decision = decide(PrefixAware(), [make_worker(0, 0), make_worker(1, 17)], arrival)
    assert (decision.worker, decision.rule) == ("w0", "unbalanced")
    assert decide(PrefixAware(), [make_worker(0, 40), make_worker(1, 57)], arrival).worker == "w1"


def test_least_prefill_weighs_a_queue_against_a_prefix() -> None:
    arrival = make_arrival(((5, 0b10),))
    # Half of 160 tokens are cached, which 80 waiting tokens make up for.
    decision = decide(LeastPrefill(), [make_worker(0), make_worker(1, waiting_tokens=80)], arrival)
    assert (decision.worker, decision.rule) == ("w1", "longest match")
    decision = decide(LeastPrefill(), [make_worker(0), make_worker(1, waiting_tokens=81)], arrival)
    assert (decision.worker, decision.rule) == ("w0", "shortest queue")


def test_least_prefill_counts_what_the_shortest_queue_has_cached() -> None:
    workers = [make_worker(0), make_worker(1, waiting_tokens=30)]
    assert decide(LeastPrefill(), workers, make_arrival(((4, 0b11), (5, 0b10)))).worker == "w0"
    assert decide(LeastPrefill(), workers, make_arrival(((3, 0b11), (5, 0b10)))).worker == "w1"


def test_least_prefill_looks_at_tokens_before_sequences() -> None:
    workers = [make_worker(0, 1, waiting_tokens=9000), make_worker(1, 9, waiting_tokens=50), make_worker(2, 8)]
    assert decide(LeastPrefill(), workers).worker == "w2"
    assert decide(LeastPrefill(), [make_worker(0, 5), make_worker(1, 4)]).worker == "w1"


def test_least_prefill_does_not_follow_a_short_match() -> None:
    workers = [make_worker(0, 0), make_worker(1, 10)]
    assert decide(LeastPrefill(), workers, make_arrival(((2, 0b10),))).worker == "w0"
    assert decide(LeastPrefill(), workers, make_arrival(((3, 0b10),))).worker == "w1"


def test_least_prefill_does_not_pile_up_load() -> None:
    arrival = make_arrival(((10, 0b10),))
    assert decide(LeastPrefill(), [make_worker(0, 0), make_worker(1, 16)], arrival).worker == "w1"
    assert decide(LeastPrefill(), [make_worker(0, 0), make_worker(1, 17)], arrival).worker == "w0"


def test_min_ttft_weighs_a_queue_against_a_prefix() -> None:
    arrival = make_arrival(((5, 0b10),))
    # Half of 160 tokens are cached: 0.08 s less, which 80 waiting tokens make up for.
    short = [make_worker(0), make_worker(1, waiting_tokens=70)]
    decision = decide(MinTtft(COST), short, arrival)
    assert (decision.worker, decision.expected_ttft_s) == ("w1", pytest.approx(0.15))
    long = [make_worker(0), make_worker(1, waiting_tokens=90)]
    assert decide(MinTtft(COST), long, arrival).worker == "w0"


def test_however_many_are_looked_at_few_are_shown_and_a_holder_of_most_among_them() -> None:
    # The more a worker holds the longer its queue, so that one after the other seems better; two hold most.
    depths = [12, 0, *range(1, 13)]
    queues = [99_000, *(1000 * depth for depth in depths[1:])]
    workers = [make_worker(bit, waiting_tokens=queue) for bit, queue in enumerate(queues)]
    levels = tuple((d, sum(1 << bit for bit, depth in enumerate(depths) if depth >= d)) for d in range(1, 13))
    decision = decide(MinTtft(COST), workers, make_arrival(levels, 12))
    assert (decision.worker, len(decision.scores)) == ("w1", MAX_SCORES)
    assert 12 in {score.matched_blocks for score in decision.scores}


def test_min_ttft_fetches_a_prefix_where_that_is_faster() -> None:
    workers, arrival = [make_worker(0), make_worker(1, waiting_tokens=500)], make_arrival(((10, 0b10),))
    decision = decide(MinTtft(COST, transfer=Transfer(0.001)), workers, arrival)
    assert (decision.worker, decision.rule) == ("w0", "fetch")
    assert decision.expected_ttft_s == pytest.approx(0.01)
    slow = decide(MinTtft(COST, transfer=Transfer(1.0)), workers, arrival)
    assert (slow.worker, slow.rule) == ("w0", "compute")


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3000)), min_size=1, max_size=30),
    st.one_of(st.none(), st.floats(0, 0.1)),
)
def test_no_other_worker_has_a_lower_estimate(shape: list[tuple[int, int]], block_s: float | None) -> None:
    workers = [make_worker(bit, waiting_tokens=waiting) for bit, (_, waiting) in enumerate(shape)]
    depths = sorted({depth for depth, _ in shape if depth})
    levels = tuple((d, sum(1 << bit for bit, (held, _) in enumerate(shape) if held >= d)) for d in depths)
    policy = MinTtft(COST, transfer=Transfer(block_s))
    decision = decide(policy, workers, make_arrival(levels, 6))
    estimates = [
        COST.prefill_s(waiting) + policy._first_token_s(make_arrival(levels, 6), held)[0] for held, waiting in shape
    ]
    assert decision.expected_ttft_s == pytest.approx(min(estimates))
    assert estimates[int(decision.worker[1:])] == pytest.approx(min(estimates))


def test_min_ttft_splits_where_workers_only_prefill() -> None:
    workers = [make_worker(0, role="prefill", waiting_tokens=9), make_worker(1, 2, role="decode")]
    workers.append(make_worker(2, 1, role="decode"))
    decision = decide(MinTtft(COST), workers)
    assert (decision.worker, decision.stop_after) == ("w0", 1)
    decoded = decide(MinTtft(COST), workers, make_arrival(is_decode=True))
    assert (decoded.worker, decoded.stop_after) == ("w2", None)
    alone = decide(MinTtft(COST), workers[:1], make_arrival(is_decode=True))
    assert (alone.worker, alone.stop_after) == ("w0", None), "while no worker that decodes has room"


def test_assumed_heatmap_splits_long_prompts_with_short_answers() -> None:
    gains = [heatmap_cell(*shape) in ASSUMED_HEATMAP for shape in [(1023, 10.0), (1024, 255.0), (1024, 256.0)]]
    assert gains == [False, True, False]


def test_preble_exploits_where_more_is_cached_than_not() -> None:
    workers = [make_worker(0), make_worker(1)]
    assert decide(PrebleE2(COST), workers, make_arrival(((5, 0b10),))).rule == "exploit"
    assert decide(PrebleE2(COST), workers, make_arrival(((4, 0b10),))).rule == "explore"
    large = make_arrival(((5, 0b10),), num_tokens=10 * 512)
    assert decide(PrebleE2(COST, block_size=512), workers, large).rule == "exploit"


def test_preble_explores_where_least_work_was_given_of_late() -> None:
    policy, pool = PrebleE2(COST, window_s=10.0), Pool([make_worker(bit) for bit in range(3)])
    chosen = [policy.decide(make_arrival(num_blocks=n), pool).worker for n in (30, 20, 10)]
    assert chosen == ["w0", "w1", "w2"]
    assert policy.decide(make_arrival(now=1.0), pool).worker == "w2"
    # All of it is long ago.
    assert policy.decide(make_arrival(now=20.0), pool).worker == "w0"


def test_heatmap_splits_only_cells_that_gain_and_while_prefill_workers_have_room() -> None:
    cell = heatmap_cell(160, 100.0)
    workers = [make_worker(0, role="prefill"), make_worker(1, role="decode"), make_worker(2, load=1, role="both")]
    decision = decide(PdHeatmap({cell: 0.2}), workers)
    assert (decision.worker, decision.stop_after) == ("w0", 1)
    idle = [*workers[:2], make_worker(2, role="both")]
    assert decide(PdHeatmap({cell: -0.2}), idle).worker == "w2"
    assert decide(PdHeatmap({}), idle).worker == "w2"
    busy = [make_worker(0, load=9, role="prefill"), *workers[1:]]
    assert decide(PdHeatmap({cell: 0.2}), busy).worker == "w2", "load overrides"
    assert decide(PdHeatmap({cell: -0.2}), workers).worker == "w0", "either way"
    assert decide(PdHeatmap({cell: 0.2}), workers, make_arrival(is_decode=True)).worker == "w1"


def test_heatmap_always_splits_where_no_worker_does_both() -> None:
    workers = [make_worker(0, load=9, role="prefill"), make_worker(1, role="decode")]
    assert decide(PdHeatmap({}), workers).worker == "w0"


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 12)), min_size=1, max_size=40),
    st.sampled_from(sorted(ROUTES)),
    st.booleans(),
)
def test_decision_is_for_a_candidate_and_lists_it_first(
    shape: list[tuple[int, int]], name: str, is_decode: bool
) -> None:
    roles = ("both", "prefill", "decode")
    workers = [make_worker(bit, load, role=roles[bit % 3]) for bit, (load, _) in enumerate(shape)]
    depths = sorted({depth for _, depth in shape if depth})
    levels = tuple((d, sum(1 << bit for bit, (_, held) in enumerate(shape) if held >= d)) for d in depths)
    policy = ROUTES[name](RouteContext(random.Random(1), COST))
    decision = decide(policy, workers, make_arrival(levels, 12, is_decode=is_decode))
    by_name = {worker.name: bit for bit, worker in enumerate(workers)}
    assert decision.scores[0].worker == decision.worker and decision.worker in by_name
    assert decision.policy == name
    if name not in ("pd_heatmap", "min_ttft"):
        assert decision.num_candidates == len(workers)
        assert len(decision.scores) == min(MAX_SCORES, len(workers))
        assert decision.least_load == min(worker.load for worker in workers)
        # Whoever holds most of the prompt can be compared with.
        assert max(score.matched_blocks for score in decision.scores) == max(depth for _, depth in shape)
    assert len({score.worker for score in decision.scores}) == len(decision.scores) <= MAX_SCORES
    for score in decision.scores:
        assert score.matched_blocks == shape[by_name[score.worker]][1]
    if name == "prefix_aware" and decision.rule == "longest match":
        assert decision.scores[0].matched_blocks == max(depth for _, depth in shape)
