from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_requests import make_sequence
from weft.hashing import BLOCK_SIZE, chain_root
from worker_svc.batch import POLICIES, Limits, StepPlan, plan_step
from worker_svc.blocks import BlockPool
from worker_svc.sequence import Sequence, State, blocks_for

ROOT = chain_root(b"digest")


@dataclass
class Simulation:
    """The engine's books without an engine: computes what is planned and appends a token where one is due."""

    pool: BlockPool
    limits: Limits
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    rejected: list[Sequence] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)

    def step(self) -> StepPlan:
        plan = plan_step(self.waiting, self.running, self.pool, self.limits, float(len(self.plans)))
        self.plans.append(plan)
        self.rejected += [sequence for sequence, _ in plan.rejected]
        for sequence, count in plan.num_scheduled_tokens.items():
            assert count > 0 and sequence in self.running and sequence.state is State.RUNNING
            assert len(sequence.block_table) >= blocks_for(sequence.num_computed_tokens + count)
            sequence.num_computed_tokens += count
            full = sequence.num_computed_tokens // BLOCK_SIZE
            if sequence.root is not None:
                hashes = sequence.extend_hashes()
                for i in range(sequence.num_committed_blocks, full):
                    self.pool.commit(sequence.block_table[i], hashes[i])
                sequence.num_committed_blocks = full
            if not sequence.num_uncomputed_tokens:
                sequence.token_ids.append(sequence.seed)
                if len(sequence.token_ids) >= sequence.end_length:
                    self.running.remove(sequence)
                    self.pool.free(sequence.release())
                    self.finished.append(sequence)
        self.pool.check(sequence.block_table for sequence in self.running)
        return plan

    def run(self, steps: int = 3000) -> None:
        while self.waiting or self.running:
            self.step()
            steps -= 1
            assert steps, "somebody starves"


def make(
    lengths: list[tuple[int, int]], *, num_blocks: int = 64, shared: int = 0, root: bool = True, **limits: object
) -> Simulation:
    """Sequences of (prompt, completion) tokens, whose first `shared` prompt tokens are the same."""
    chosen = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **limits}
    simulation = Simulation(BlockPool(num_blocks), Limits(**chosen))
    for i, (prompt, completion) in enumerate(lengths):
        tokens = [0] * min(shared, prompt) + [i + 1] * max(0, prompt - shared)
        simulation.waiting.append(
            make_sequence(tokens, arrival=i, seed=i, end_length=prompt + completion, root=ROOT if root else None)
        )
    return simulation


def counts(plan: StepPlan) -> list[int]:
    return list(plan.num_scheduled_tokens.values())


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    simulation = make([(150, 2)])
    assert [counts(simulation.step()) for _ in range(4)] == [[64], [64], [22], [1]]
    assert simulation.finished


def test_decodes_come_first_then_partial_prefills_then_waiting() -> None:
    simulation = make([(4, 9), (100, 9), (30, 9)])
    first, long, last = simulation.waiting
    assert simulation.step().num_scheduled_tokens == {first: 4, long: 60}
    second = simulation.step()
    assert list(second.num_scheduled_tokens.items()) == [(first, 1), (long, 40), (last, 23)]
    assert second.admitted == (last,)


def test_no_more_sequences_run_than_allowed() -> None:
    simulation = make([(4, 3)] * 5, max_num_seqs=2)
    simulation.step()
    assert len(simulation.running) == 2 and len(simulation.waiting) == 3
    simulation.run()
    assert len(simulation.finished) == 5


def test_sequence_admitted_last_is_preempted_when_blocks_run_out() -> None:
    simulation = make([(30, 30), (14, 8)], num_blocks=4, root=False)
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
    simulation = make([(20, 60)] * 3, num_blocks=64)
    sequences = list(simulation.waiting)
    for _ in range(50):
        simulation.step()
    for sequence in sequences:
        table = sequence.block_table
        assert table == list(range(table[0], table[0] + blocks_for(80)))


def test_blocks_held_ahead_are_taken_back_before_anyone_waits_for_blocks() -> None:
    simulation = make([(16, 100), (16, 100), (12 * BLOCK_SIZE, 2)], num_blocks=20, root=False, max_num_seqs=3)
    early, late, long = simulation.waiting
    plan = simulation.step()
    assert plan.admitted == (early, late, long)
    assert len(early.block_table) == len(late.block_table) == 1


def test_blocks_held_ahead_are_taken_back_before_anyone_is_preempted() -> None:
    simulation = make([(16, 40), (16, 160)], num_blocks=13, root=False)
    simulation.run()
    assert not any(plan.preempted for plan in simulation.plans)
    assert len(simulation.finished) == 2


def test_sequence_that_can_never_fit_fails_alone() -> None:
    simulation = make([(500, 2), (20, 2)], num_blocks=4)
    too_long, other = simulation.waiting
    plan = simulation.step()
    assert [sequence for sequence, _ in plan.rejected] == [too_long]
    assert "500 tokens are more than this worker's KV memory holds (64 tokens)" in plan.rejected[0][1].message
    assert other in plan.num_scheduled_tokens


def test_sequence_that_grows_beyond_the_pool_fails_alone() -> None:
    simulation = make([(60, 20), (20, 2)], num_blocks=4, root=False)
    too_long, other = simulation.waiting
    simulation.run()
    assert simulation.rejected == [too_long] and simulation.finished == [other]


def test_waiting_sequence_is_admitted_only_with_blocks_for_all_of_its_tokens() -> None:
    simulation = make([(40, 30), (60, 2)], num_blocks=6, max_num_batched_tokens=48)
    simulation.step()
    assert len(simulation.running) == 1 and len(simulation.waiting) == 1
    simulation.run()
    assert not any(plan.preempted for plan in simulation.plans)


def test_prefix_hits_are_not_computed_again() -> None:
    simulation = make([(50, 1), (50, 1)], shared=40, max_num_seqs=1)
    simulation.run()
    assert counts(simulation.plans[0]) == [50]
    second = simulation.plans[1]
    assert counts(second) == [50 - 2 * BLOCK_SIZE]
    assert simulation.finished[1].num_cached_tokens == 2 * BLOCK_SIZE


def test_prompt_that_is_cached_whole_computes_its_last_token_in_a_copy() -> None:
    simulation = make([(32, 2), (32, 2)], shared=32, max_num_seqs=1)
    simulation.step()
    cached = simulation.pool.lookup(simulation.running[0].hashes)
    simulation.run()
    plan = simulation.plans[2]
    assert counts(plan) == [1] and len(plan.copies) == 1
    source, target = plan.copies[0]
    assert source == cached[1] and target not in cached


def test_last_block_is_computed_again_when_there_is_none_for_its_copy() -> None:
    simulation = make([(32, 1), (32, 1)], shared=32, num_blocks=2, max_num_seqs=1)
    simulation.run()
    assert counts(simulation.plans[1]) == [BLOCK_SIZE] and simulation.plans[1].copies == ()


def test_sequences_that_arrive_together_compute_a_common_prefix_once() -> None:
    simulation = make([(50, 2)] * 3, shared=48, max_num_batched_tokens=500)
    simulation.run()
    assert sum(sum(counts(plan)) for plan in simulation.plans) == 50 + 2 * 2 + 3
    assert {sequence.num_cached_tokens for sequence in simulation.finished} == {0, 48}


def test_static_batch_starts_when_the_one_before_has_wholly_ended() -> None:
    simulation = make([(4, 2), (4, 30), (4, 2), (4, 2)], max_num_seqs=2, policy="static")
    simulation.run()
    admitted = [(i, len(plan.admitted)) for i, plan in enumerate(simulation.plans) if plan.admitted]
    assert admitted == [(0, 2), (30, 2)]


def test_static_batch_is_admitted_whole_even_beyond_the_budget() -> None:
    simulation = make([(50, 2)] * 3, policy="static")
    plan = simulation.step()
    assert len(plan.admitted) == 3 and sum(counts(plan)) == 64
    simulation.run()
    assert len(simulation.finished) == 3


lengths = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12)
loads = st.fixed_dictionaries(
    {
        "lengths": lengths,
        "shared": st.sampled_from([0, 16, 40, 64]),
        "num_blocks": st.integers(9, 30),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 100),
        "policy": st.sampled_from(sorted(POLICIES)),
        "root": st.booleans(),
    }
)


@given(loads)
@settings(max_examples=100, deadline=None)
def test_everyone_finishes_within_budget_and_blocks(load: dict[str, object]) -> None:
    simulation = make(**load)
    total = len(simulation.waiting)
    simulation.run()
    assert len(simulation.finished) == total and simulation.rejected == []
    limits = simulation.limits
    for plan in simulation.plans:
        assert 0 < sum(counts(plan)) <= limits.max_num_batched_tokens
        assert len(plan.num_scheduled_tokens) <= limits.max_num_seqs
        assert not (plan.preempted and plan.admitted)
    assert simulation.pool.num_free_blocks == simulation.pool.num_blocks


@given(loads)
@settings(max_examples=40, deadline=None)
def test_plans_are_deterministic(load: dict[str, object]) -> None:
    def plans() -> list[object]:
        simulation = make(**load)
        simulation.run()
        return [
            (
                [(sequence.arrival, count) for sequence, count in plan.num_scheduled_tokens.items()],
                [sequence.arrival for sequence in plan.admitted],
                [sequence.arrival for sequence in plan.preempted],
                plan.copies,
            )
            for plan in simulation.plans
        ]

    assert plans() == plans()


@given(lengths, st.integers(9, 20))
@settings(max_examples=60, deadline=None)
def test_whoever_is_first_is_never_overtaken_at_admission(lengths: list[tuple[int, int]], num_blocks: int) -> None:
    simulation = make(lengths, num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=32)
    simulation.run()
    first = [sequence.admitted_at for sequence in sorted(simulation.finished, key=lambda sequence: sequence.arrival)]
    assert first == sorted(first)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_steps_without_work_are_empty(policy: str) -> None:
    plan = make([], policy=policy).step()
    assert plan.num_scheduled_tokens == {} and plan.admitted == plan.preempted == plan.rejected == plan.copies == ()
