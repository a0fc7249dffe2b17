"""lab.simulator.worker: runs of steps give what single steps give, and a step takes what the formula says."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from lab.simulator.record import Record
from lab.simulator.worker import SimWorker
from scheduler_svc.cost_model import CostModel
from weft.hashing import HASH_BYTES
from weft.messages import Choice, SamplingParams, TokenizedRequest
from worker_svc.batch import Limits
from worker_svc.engine_io import BlocksLoaded

COST = CostModel(overhead_s=0.01, token_s=1e-4, attention_s=1e-8, context_s=1e-6, sequence_s=1e-3)


@dataclass(slots=True)
class Asked:
    """One request, and when it comes."""

    at: float
    request: TokenizedRequest
    record: Record


def make_worker(*, num_blocks: int = 1000, cost: CostModel = COST) -> SimWorker:
    return SimWorker("w", cost, Limits(8, 256), num_blocks=num_blocks, block_size=16)


def ask(number: int, at: float, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> Asked:
    hashes = b"".join(block.to_bytes(HASH_BYTES, "big") for block in blocks)
    choices = [Choice(0, 0)]
    request = TokenizedRequest(f"r{number}", 0, "g", "m", bytes(4 * prompt), hashes, SamplingParams(), choices)
    return Asked(at, request, Record(f"r{number}", at, prompt, output))


def play(worker: SimWorker, asked: list[Asked], *, step_by_step: bool = False) -> list[Record]:
    """Give a worker requests until all have ended; runs of one step each if `step_by_step`."""
    waiting, ended, ends_at = sorted(asked, key=lambda one: one.at), [], None
    while waiting or ends_at is not None:
        if waiting and (ends_at is None or waiting[0].at < ends_at):
            one = waiting.pop(0)
            worker.take(one.request, one.record, None)
            if worker.run is not None:
                ends_at = worker.cut(one.at)
                continue
            now = one.at
        else:
            assert ends_at is not None
            now, outcome = ends_at, worker.finish(ends_at)
            for record in outcome.first_tokens:
                record.first_token_at = outcome.first_at
            for record in outcome.ended:
                record.ended_at = now
                ended.append(record)
        ends_at, _ = worker.begin(now)
        if step_by_step and worker.run is not None:
            worker.run.num_steps = 1
            ends_at = worker.run.end_of(1)
    return ended


def workload(seed: int, longest: int = 600) -> list[Asked]:
    chance = random.Random(seed)
    return [ask(i, chance.uniform(0, 2), chance.randrange(1, longest), chance.randrange(1, 80)) for i in range(30)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("num_blocks", "longest"),
    [(1000, 600), (60, 600), (3000, 5000), (400, 5000)],
    ids=["ample memory", "preemptions", "long prompts", "long prompts and preemptions"],
)
def test_runs_that_arrivals_cut_short_give_what_single_steps_give(seed: int, num_blocks: int, longest: int) -> None:
    runs, steps = make_worker(num_blocks=num_blocks), make_worker(num_blocks=num_blocks)

    in_runs = play(runs, workload(seed, longest))
    in_steps = play(steps, workload(seed, longest), step_by_step=True)

    assert [record.request_id for record in in_runs] == [record.request_id for record in in_steps]
    assert (runs.num_steps, runs.num_preemptions) == (steps.num_steps, steps.num_preemptions)
    assert runs.busy_s == pytest.approx(steps.busy_s)
    for run, step in zip(in_runs, in_steps, strict=True):
        assert run.first_token_at == pytest.approx(step.first_token_at)
        assert run.ended_at == pytest.approx(step.ended_at)
        assert sum(count for _, count in run.gaps) == sum(count for _, count in step.gaps) == run.num_output_tokens - 1


def test_scarce_memory_preempts_and_still_ends_everything() -> None:
    worker = make_worker(num_blocks=60)

    ended = play(worker, workload(0))

    assert worker.num_preemptions > 0
    assert len(ended) == 30 and not worker.num_held
    worker.pool.check(tables=[])


def test_time_to_first_token_of_an_idle_worker_is_the_formula_in_chunks() -> None:
    [record] = play(make_worker(), [ask(0, 5.0, 600, 1)])

    chunks = COST.prefill_s(256) + COST.prefill_s(512, 256) + COST.prefill_s(600, 512)
    assert record.ttft_s == pytest.approx(3 * COST.overhead_s + chunks)
    assert record.prefilled_s == pytest.approx(chunks)


def test_gaps_between_tokens_are_the_formula_and_grow_with_the_context() -> None:
    [record] = play(make_worker(), [ask(0, 0.0, 100, 4)])

    gaps = [COST.overhead_s + COST.decode_s(1, context) for context in (101, 102, 103)]
    assert sum(gap * count for gap, count in record.gaps) == pytest.approx(sum(gaps))
    assert record.mean_gap_s() == pytest.approx(gaps[1])


def test_chunks_of_one_prompt_beside_decodes_are_planned_as_one_run() -> None:
    worker = make_worker()
    short, long = ask(0, 0.0, 10, 60), ask(1, 0.0, 2000, 5)
    worker.take(short.request, short.record, None)
    now, _ = worker.begin(0.0)
    assert now is not None
    worker.finish(now)
    worker.take(long.request, long.record, None)
    worker.begin(now)

    # Seven pieces of 255 tokens, and the eighth leaves something of the budget.
    assert worker.run is not None and worker.run.num_steps == 7
    worker.finish(worker.run.end_of(7))
    assert [sequence.num_uncomputed_tokens for sequence in worker.running] == [1, 2000 - 7 * 255]
    worker.pool.check(tables=[sequence.block_table for sequence in worker.running])


def test_rate_of_prefill_counts_every_step_of_a_run() -> None:
    runs, steps = make_worker(), make_worker()

    play(runs, [ask(0, 0.0, 5000, 1)])
    play(steps, [ask(0, 0.0, 5000, 1)], step_by_step=True)

    # Steps that see more take longer, and the last ones weigh more where each is counted by itself.
    assert runs.status().prefill_tokens_per_s == pytest.approx(steps.status().prefill_tokens_per_s, rel=0.1)


def test_times_spread_around_the_formula_as_they_are_said_to() -> None:
    limits = Limits(8, 256)
    worker = SimWorker("w", COST, limits, num_blocks=1000, block_size=16, spread=(0.5, 1.5))

    [record] = play(worker, [ask(0, 0.0, 100, 200)])

    exact = [COST.overhead_s + COST.decode_s(1, 100 + number) for number in range(1, 200)]
    factors = [gap / one for (gap, _), one in zip(record.gaps, exact, strict=True)]
    assert {round(factor, 6) for factor in factors} == {0.5, 1.5}
    assert 70 < sum(factor > 1 for factor in factors) < 130


def test_a_prompt_that_is_cached_whole_has_its_first_token_after_one_step() -> None:
    worker = make_worker()

    first, second = play(worker, [ask(0, 0.0, 32, 20, (1, 2)), ask(1, 10.0, 32, 20, (1, 2))])

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 31)
    assert second.ttft_s == pytest.approx(COST.overhead_s + COST.decode_s(1, 32))


def test_what_is_to_be_yielded_ends_after_so_many_tokens() -> None:
    worker, one = make_worker(), ask(0, 0.0, 100, 10)
    worker.take(one.request, one.record, 3)
    now, yielded = 0.0, []
    while True:
        ends_at, _ = worker.begin(now)
        if ends_at is None:
            break
        now = ends_at
        yielded += worker.finish(now).yielded

    assert [sequence.num_output_tokens for sequence in yielded] == [3]
    assert not worker.num_held


def test_a_sequence_that_waits_for_blocks_is_admitted_when_they_come_and_computes_the_rest() -> None:
    worker, one = make_worker(), ask(0, 0.0, 100, 1, tuple(range(1, 7)))
    worker.share_kv(1e-6)
    wanted = worker.take(one.request, one.record, None)

    assert wanted is not None and worker.begin(0.0) == (None, [])
    worker.take_loaded(BlocksLoaded("r0", 0, wanted.hashes[:4], (b"\0",) * 4), 0.5)
    ends_at, _ = worker.begin(0.5)

    assert ends_at == pytest.approx(0.5 + COST.overhead_s + COST.prefill_s(100, 64))
    assert (one.record.num_fetched_tokens, one.record.num_cached_tokens) == (64, 64)


def test_blocks_that_come_slower_than_they_are_computed_are_not_asked_for() -> None:
    worker = make_worker()
    worker.share_kv(1.0)
    play(worker, [ask(0, 0.0, 50, 2)])
    one = ask(1, 10.0, 100, 1, tuple(range(1, 7)))

    assert worker.take(one.request, one.record, None) is None
    assert worker.begin(10.0)[0] is not None
