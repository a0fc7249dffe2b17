"""The sums over workers that are kept up are those of counting all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.totals import Sums, Totals
from scheduler_svc.workers import Worker
from tests.support.scheduling import make_worker

NUMBERS = st.integers(0, 9)
WORKERS = st.builds(
    make_worker,
    NUMBERS,
    NUMBERS,
    max_num_seqs=st.integers(1, 3),
    waiting_tokens=NUMBERS,
    block_load_s=st.sampled_from((0.0, 0.1, 1e-9, 1 / 3)),
    prefill_tokens_per_s=st.sampled_from((0.0, 0.1, 1e12, 1 / 3)),
    decode_tokens_per_s=st.floats(0, 1e12),
)


@given(st.lists(st.tuples(st.booleans(), WORKERS), max_size=40))
def test_sums_are_those_of_a_recount(changes: list[tuple[bool, Worker]]) -> None:
    totals, workers = Totals(), {}
    for is_there, worker in changes:
        if is_there:
            totals.put(worker)
            workers[worker.name] = worker
        else:
            totals.discard(worker)
            workers.pop(worker.name, None)
    assert totals.is_same(Totals(workers.values()))
    assert {worker.name for worker in totals} == set(workers)
    assert totals.max_num_seqs == max((worker.status.max_num_seqs for worker in workers.values()), default=0)


def test_nothing_is_left_of_rates_that_have_gone() -> None:
    totals = Totals()
    for _ in range(1000):
        for bit, rate in enumerate((0.1, 1e9 / 3, 0.7)):
            totals.put(make_worker(bit, prefill_tokens_per_s=rate))
        for bit in range(3):
            totals.discard(make_worker(bit))
    assert (totals.sums, len(totals)) == (Sums(), 0)


def test_rates_are_those_of_the_workers_together() -> None:
    totals = Totals([make_worker(0, prefill_tokens_per_s=1000.5, decode_tokens_per_s=20.25), make_worker(1)])
    assert (totals.sums.prefill_tokens_per_s, totals.sums.decode_tokens_per_s) == (1000.5, 20.25)
    assert (len(totals), totals.sums.num_measured) == (2, 1)


def test_rates_are_those_of_the_workers_that_are_for_it() -> None:
    rates = {"prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0}
    sums = Totals(make_worker(bit, role=role, **rates) for bit, role in enumerate(("both", "prefill", "decode"))).sums
    assert (sums.num_prefilling, sums.num_decoding) == (2, 2)
    assert (sums.prefill_tokens_per_s, sums.decode_tokens_per_s) == (200, 20)


def test_the_time_of_a_block_is_the_mean_of_those_that_loaded_some() -> None:
    assert Totals([make_worker(0)]).sums.block_load_s is None
    totals = Totals(make_worker(bit, block_load_s=seconds) for bit, seconds in enumerate((0.0, 0.001, 0.003)))
    assert totals.sums.block_load_s == pytest.approx(0.002)
