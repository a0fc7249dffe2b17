from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lab.simulator.hardware import HARDWARE
from lab.simulator.record import Slo
from lab.simulator.sweep import Case, Knobs, Row, find_size, make_setup, play, play_all
from lab.simulator.trace import Arrival, Trace
from weft.presets import PRESETS

TRACE = Trace("made-up", tuple(Arrival(0.3 * i, 500, 20, (0, 1 + i)) for i in range(40)), 256)
KNOBS = Knobs(HARDWARE["h100"], Slo(1.0, 0.1))


def case(load: float = 1.0, preset: str = "vllm", num_workers: int = 2, knobs: Knobs = KNOBS) -> Case:
    return Case(TRACE, preset, load, make_setup(TRACE, PRESETS[preset], num_workers, knobs))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_plays_a_trace_to_its_end(preset: str) -> None:
    row = play(case(preset=preset, num_workers=4))
    assert row.summary.num_requests == 40 and row.summary.num_ended + row.summary.num_refused == 40
    assert (row.trace, row.preset, row.num_workers) == ("made-up", preset, 4)


def test_load_is_a_multiple_of_the_rate() -> None:
    assert play(case(load=4.0)).offered_rps == pytest.approx(4 * play(case()).offered_rps)


def test_knobs_win_over_the_preset() -> None:
    policies = {"route": "random", "predict": "oracle"}
    setup = case(
        knobs=Knobs(
            HARDWARE["a100"],
            Slo(),
            policies=policies,
            roles={"prefill": 1, "decode": 2},
            batching="static",
            max_num_seqs=7,
            kv_tokens=4096,
            pool_tokens=100,
        )
    ).setup
    assert setup.names.route == "random" and setup.names.order == PRESETS["vllm"].order and setup.knows_lengths
    assert (setup.fleet.limits.policy, setup.fleet.limits.max_num_seqs) == ("static", 7)
    assert setup.fleet.limits.max_num_batched_tokens == PRESETS["vllm"].max_num_batched_tokens
    assert setup.fleet.kv_tokens == 4096 and setup.fleet.roles == {"prefill": 1, "decode": 2}
    assert setup.fleet.sharing is not None and setup.fleet.sharing.capacity_tokens == 100


def test_a_request_longer_than_the_memory_does_not_let_reserve_max_refuse_the_others() -> None:
    trace = Trace("one too long", (*TRACE.arrivals, Arrival(12.0, 5000, 20, ())), 256)
    knobs = replace(KNOBS, reserve="reserve_max", kv_tokens=4200)
    summary = play(Case(trace, "vllm", 1.0, make_setup(trace, PRESETS["vllm"], 2, knobs))).summary
    assert (summary.num_ended, summary.num_refused) == (40, 1)


def test_only_presets_with_a_pool_share_memory() -> None:
    assert case(preset="vllm").setup.fleet.sharing is None
    shared = case(preset="mooncake").setup.fleet.sharing
    assert shared is not None and shared.capacity_tokens == 2 * HARDWARE["h100"].kv_tokens


def test_processes_give_the_rows_of_one_in_order() -> None:
    told: list[int] = []

    def tell(num_ended: int, row: Row | None) -> None:
        told.append(num_ended)

    cases = [case(load) for load in (1.0, 8.0, 2.0)]
    assert play_all(cases, 2, tell) == play_all(cases, 1, tell)
    assert told == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 9, 100])
def test_size_is_the_fewest_that_are_enough(wanted: int) -> None:
    tried: list[int] = []

    def share_with(num_workers: int) -> float:
        tried.append(num_workers)
        return 1.0 if num_workers >= wanted else 0.9 * num_workers / wanted

    assert find_size(share_with, 0.95, 4096) == wanted
    assert len(tried) == len(set(tried)) <= 2 * math.ceil(math.log2(wanted) + 1)


def test_size_is_none_if_the_most_are_too_few() -> None:
    tried: list[int] = []

    def share_with(num_workers: int) -> float:
        tried.append(num_workers)
        return 0.09 * num_workers

    assert find_size(share_with, 0.95, 10) is None
    assert tried == [1, 2, 4, 8, 10]


@pytest.mark.parametrize(("shares", "tried"), [((0.1, 0.8, 0.8, 0.8, 1.0), 4), ((0.0, 0.0, 0.0, 0.0, 1.0), 5)])
def test_size_is_not_looked_for_where_more_workers_make_no_request_good(shares: tuple[float, ...], tried: int) -> None:
    left = list(shares)
    find_size(lambda num_workers: left.pop(0) if left else 1.0, 0.95, 4096)
    assert len(shares) - len(left) == tried
