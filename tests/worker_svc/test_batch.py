import pytest

from tests.support.batches import counts, make_simulation
from weft.hashing import BLOCK_SIZE
from worker_svc.batch import POLICIES, Work, plan_step
from worker_svc.sequence import State


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    simulation = make_simulation([(150, 2)])
    assert [counts(simulation.step()) for _ in range(4)] == [[64], [64], [22], [1]]
    assert simulation.finished


def test_decodes_come_first_then_partial_prefills_then_waiting() -> None:
    simulation = make_simulation([(4, 9), (100, 9), (30, 9)])
    first, long, last = simulation.waiting
    assert simulation.step().num_scheduled_tokens == {first: 4, long: 60}
    second = simulation.step()
    assert list(second.num_scheduled_tokens.items()) == [(first, 1), (long, 40), (last, 23)]
    assert second.admitted == (last,)


def test_no_more_sequences_run_than_allowed() -> None:
    simulation = make_simulation([(4, 3)] * 5, max_num_seqs=2)
    simulation.step()
    assert len(simulation.running) == 2 and len(simulation.waiting) == 3
    simulation.run()
    assert len(simulation.finished) == 5


def test_sequence_admitted_last_is_preempted_when_blocks_run_out() -> None:
    simulation = make_simulation([(30, 30), (14, 8)], num_blocks=4, root=False)
    early, late = simulation.waiting
    simulation.step()
    assert simulation.running == [early, late]
    while not (plan := simulation.step()).preempted:
        assert late not in simulation.finished
    assert plan.preempted == (late,) and plan.admitted == ()
    assert simulation.waiting == [late] and late.state is State.WAITING
    assert late.block_table == [] and late.num_computed_tokens == 0
    assert len(late.token_ids) > 14, "its tokens stay"
    simulation.run()
    assert simulation.finished == [early, late]


def test_sequences_that_grow_in_turn_lie_together_while_most_blocks_are_free() -> None:
    simulation = make_simulation([(20, 60)] * 3, num_blocks=64)
    sequences = list(simulation.waiting)
    for _ in range(50):
        simulation.step()
    for sequence in sequences:
        table = sequence.block_table
        assert table == list(range(table[0], table[0] + simulation.pool.blocks_for(80)))


def test_blocks_held_ahead_are_taken_back_before_anyone_waits_for_blocks() -> None:
    simulation = make_simulation(
        [(16, 100), (16, 100), (12 * BLOCK_SIZE, 2)], num_blocks=20, root=False, max_num_seqs=3
    )
    early, late, long = simulation.waiting
    plan = simulation.step()
    assert plan.admitted == (early, late, long)
    assert len(early.block_table) == len(late.block_table) == 1


def test_blocks_held_ahead_are_taken_back_before_anyone_is_preempted() -> None:
    simulation = make_simulation([(16, 40), (16, 160)], num_blocks=13, root=False)
    simulation.run()
    assert not any(plan.preempted for plan in simulation.plans)
    assert len(simulation.finished) == 2


def test_sequence_that_can_never_fit_fails_alone() -> None:
    simulation = make_simulation([(500, 2), (20, 2)], num_blocks=4)
    too_long, other = simulation.waiting
    plan = simulation.step()
    assert [sequence for sequence, _ in plan.rejected] == [too_long]
    assert "500 tokens are more than this worker's KV memory holds (64 tokens)" in plan.rejected[0][1].message
    assert other in plan.num_scheduled_tokens


def test_sequence_that_grows_beyond_the_pool_fails_alone() -> None:
    simulation = make_simulation([(60, 20), (20, 2)], num_blocks=4, root=False)
    too_long, other = simulation.waiting
    simulation.run()
    assert simulation.rejected == [too_long] and simulation.finished == [other]


def test_waiting_sequence_is_admitted_only_with_blocks_for_all_of_its_tokens() -> None:
    simulation = make_simulation([(40, 30), (60, 2)], num_blocks=6, max_num_batched_tokens=48)
    simulation.step()
    assert len(simulation.running) == 1 and len(simulation.waiting) == 1
    simulation.run()
    assert not any(plan.preempted for plan in simulation.plans)


def test_prefix_hits_are_not_computed_again() -> None:
    simulation = make_simulation([(50, 1), (50, 1)], shared=40, max_num_seqs=1)
    simulation.run()
    assert counts(simulation.plans[0]) == [50]
    second = simulation.plans[1]
    assert counts(second) == [50 - 2 * BLOCK_SIZE]
    assert simulation.finished[1].num_cached_tokens == 2 * BLOCK_SIZE


def test_prompt_that_is_cached_whole_computes_its_last_token_in_a_copy() -> None:
    simulation = make_simulation([(32, 2), (32, 2)], shared=32, max_num_seqs=1)
    simulation.step()
    cached = simulation.pool.lookup(simulation.running[0].hashes)
    simulation.run()
    plan = simulation.plans[2]
    assert counts(plan) == [1] and len(plan.copies) == 1
    source, target = plan.copies[0]
    assert source == cached[1] and target not in cached


def test_last_block_is_computed_again_when_there_is_none_for_its_copy() -> None:
    simulation = make_simulation([(32, 1), (32, 1)], shared=32, num_blocks=2, max_num_seqs=1)
    simulation.run()
    assert counts(simulation.plans[1]) == [BLOCK_SIZE] and simulation.plans[1].copies == ()


def test_sequences_that_arrive_together_compute_a_common_prefix_once() -> None:
    simulation = make_simulation([(50, 2)] * 3, shared=48, max_num_batched_tokens=500)
    simulation.run()
    assert sum(sum(counts(plan)) for plan in simulation.plans) == 50 + 2 * 2 + 3
    assert {sequence.num_cached_tokens for sequence in simulation.finished} == {0, 48}


def test_static_batch_starts_when_the_one_before_has_wholly_ended() -> None:
    simulation = make_simulation([(4, 2), (4, 30), (4, 2), (4, 2)], max_num_seqs=2, policy="static")
    simulation.run()
    admitted = [(i, len(plan.admitted)) for i, plan in enumerate(simulation.plans) if plan.admitted]
    assert admitted == [(0, 2), (30, 2)]


def test_static_batch_is_admitted_whole_even_beyond_the_budget() -> None:
    simulation = make_simulation([(50, 2)] * 3, policy="static")
    plan = simulation.step()
    assert len(plan.admitted) == 3 and sum(counts(plan)) == 64
    simulation.run()
    assert len(simulation.finished) == 3


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_steps_without_work_are_empty(policy: str) -> None:
    plan = make_simulation([], policy=policy).step()
    assert plan.num_scheduled_tokens == {} and plan.admitted == plan.preempted == plan.rejected == plan.copies == ()


def test_continuous_takes_a_prompt_whole_beside_every_decode_whatever_the_budget() -> None:
    simulation = make_simulation([(4, 9)] * 4 + [(150, 2)], policy="continuous", max_num_batched_tokens=20)
    assert counts(simulation.step()) == [4, 4, 4, 4, 150]
    assert counts(simulation.step()) == [1] * 5


def test_prefill_first_computes_every_decode_even_where_they_are_more_than_the_budget() -> None:
    simulation = make_simulation([(1, 9)] * 4, policy="prefill_first", max_num_batched_tokens=2)
    assert [counts(simulation.step()) for _ in range(3)] == [[1, 1], [1, 1], [1] * 4]


def test_prefill_first_lets_running_sequences_wait_for_every_prompt() -> None:
    simulation = make_simulation([(40, 9), (40, 9), (40, 9)], policy="prefill_first", max_num_batched_tokens=30)
    assert [counts(simulation.step()) for _ in range(4)] == [[40], [40], [40], [1, 1, 1]]


@pytest.mark.parametrize(("reserve", "blocks"), [("reserve_oracle", 4), ("reserve_pow2", 5), ("reserve_max", 8)])
def test_reservation_takes_its_blocks_at_once(reserve: str, blocks: int) -> None:
    simulation = make_simulation([(16, 33)], reserve=reserve, max_model_len=128)
    simulation.step()
    assert len(simulation.running[0].block_table) == blocks


def test_reservation_of_a_power_of_two_ends_where_the_context_ends() -> None:
    simulation = make_simulation([(40, 24)], reserve="reserve_pow2", max_model_len=64, num_blocks=4)
    simulation.run()
    assert simulation.finished and not simulation.rejected


def test_reservation_that_can_never_fit_says_what_it_wants() -> None:
    simulation = make_simulation([(20, 2)], reserve="reserve_max", max_model_len=128, num_blocks=4)
    (_, error), *_ = simulation.step().rejected
    assert "128 tokens are more than this worker's KV memory holds (64 tokens)" in error.message


def test_work_of_a_step_counts_prompts_and_decodes_apart() -> None:
    simulation = make_simulation([(10, 9), (100, 9)])
    works = []
    for _ in range(3):
        plan = plan_step(simulation.waiting, simulation.running, simulation.pool, simulation.limits, 0.0)
        works.append(plan.work())
        for sequence, count in plan.num_scheduled_tokens.items():
            sequence.num_computed_tokens += count
            if not sequence.num_uncomputed_tokens:
                sequence.token_ids.append(0)

    assert works[0] == Work(64, 10 * 5 + 54 * 27, num_chunks=2)
    assert works[1] == Work(46, 46 * (54 + 23), 1, 11, 1)
    assert works[2] == Work(num_sequences=2, num_context_tokens=12 + 101)
