"""What every batching policy promises with every reservation of blocks, over random loads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.batches import Simulation, counts, make_simulation
from weft.hashing import BLOCK_SIZE
from worker_svc.batch import BLOCKS_AHEAD, POLICIES, RESERVATIONS
from worker_svc.sequence import Sequence

CUTTING = ("chunked", "static")
WHOLE = ("continuous", "prefill_first")
# A prompt and an answer of `lengths` fit in, so in a pool of 9 blocks nobody is rejected.
MAX_MODEL_LEN = 9 * BLOCK_SIZE

lengths = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12)


def loads(policies: tuple[str, ...] = tuple(POLICIES), reserve: tuple[str, ...] = tuple(RESERVATIONS)) -> Any:
    return st.fixed_dictionaries(
        {
            "lengths": lengths,
            "shared": st.sampled_from([0, 16, 40, 64]),
            "num_blocks": st.integers(9, 30),
            "max_num_seqs": st.integers(1, 6),
            "max_num_batched_tokens": st.integers(1, 100),
            "max_model_len": st.just(MAX_MODEL_LEN),
            "policy": st.sampled_from(policies),
            "reserve": st.sampled_from(reserve),
            "root": st.booleans(),
        }
    )


def num_reserved(simulation: Simulation, sequence: Sequence) -> int:
    limits = simulation.limits
    return simulation.pool.blocks_for(RESERVATIONS[limits.reserve](sequence, limits))


@pytest.mark.parametrize("reserve", RESERVATIONS)
@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_everyone_ends_and_every_step_computes_something(data: st.DataObject, policy: str, reserve: str) -> None:
    simulation = make_simulation(**data.draw(loads((policy,), (reserve,))))
    total = len(simulation.waiting)
    for _, plan in simulation.steps():
        assert plan.num_scheduled_tokens
        assert len(simulation.running) <= simulation.limits.max_num_seqs
        assert not (plan.preempted and plan.admitted)
    assert len(simulation.finished) == total and simulation.rejected == []
    assert simulation.pool.num_free_blocks == simulation.pool.num_blocks


@given(loads(CUTTING))
@settings(max_examples=60, deadline=None)
def test_a_policy_that_cuts_prompts_keeps_the_budget(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    for _, plan in simulation.steps():
        assert sum(counts(plan)) <= simulation.limits.max_num_batched_tokens


@given(loads(WHOLE))
@settings(max_examples=60, deadline=None)
def test_a_policy_that_keeps_prompts_whole_exceeds_the_budget_by_the_last_one_only(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    budget = simulation.limits.max_num_batched_tokens
    for _, plan in simulation.steps():
        prompts = [plan.num_scheduled_tokens[sequence] for sequence in plan.admitted]
        assert all(not sequence.num_pending_tokens and sequence.num_output_tokens for sequence in plan.admitted)
        assert not prompts or sum(counts(plan)) - prompts[-1] < budget


@given(loads(("prefill_first",)))
@settings(max_examples=60, deadline=None)
def test_prefill_first_never_computes_prompts_and_decodes_in_one_step(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    for decodes, plan in simulation.steps():
        scheduled = set(plan.num_scheduled_tokens)
        assert not plan.admitted or scheduled == set(plan.admitted)
        assert plan.admitted or scheduled <= set(decodes)


@given(loads(("chunked", "continuous")))
@settings(max_examples=60, deadline=None)
def test_no_decode_waits_for_a_prompt(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    for decodes, plan in simulation.steps():
        left_out = [s for s in decodes if s not in plan.num_scheduled_tokens and s not in plan.preempted]
        if simulation.limits.policy == "chunked" and set(plan.num_scheduled_tokens) <= set(decodes):
            continue  # the budget is spent on other decodes
        # Only who lacks a block waits, for an earlier one to end.
        assert all(len(s.block_table) * BLOCK_SIZE == s.num_computed_tokens for s in left_out)


@given(loads(("static",)))
@settings(max_examples=40, deadline=None)
def test_static_admits_only_where_nobody_runs(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    while simulation.waiting or simulation.running:
        was_idle = not simulation.running
        assert was_idle or not simulation.step().admitted
        if was_idle:
            assert simulation.step().admitted


@given(loads(reserve=("reserve_max", "reserve_pow2", "reserve_oracle")))
@settings(max_examples=60, deadline=None)
def test_who_has_reserved_is_never_preempted_and_never_grows(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    for _, plan in simulation.steps():
        assert not plan.preempted
        assert all(len(s.block_table) == num_reserved(simulation, s) for s in simulation.running)


@given(st.integers(1, 90), st.integers(1, 40))
def test_each_reservation_keeps_no_less_than_the_better_informed_one(prompt: int, completion: int) -> None:
    simulation = make_simulation([(prompt, completion)], max_model_len=MAX_MODEL_LEN)
    kept = [
        RESERVATIONS[name](simulation.waiting[0], simulation.limits)
        for name in ("paged", "reserve_oracle", "reserve_pow2", "reserve_max")
    ]
    assert kept == sorted(kept) and kept[1] == prompt + completion and kept[3] == MAX_MODEL_LEN


@given(loads(reserve=("paged",)))
@settings(max_examples=60, deadline=None)
def test_paged_wastes_less_than_a_block_beyond_those_ahead(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    blocks_for = simulation.pool.blocks_for
    for _, plan in simulation.steps():
        for s in simulation.running:
            # Never beyond its end, so what it does not fill of its last block is all that it wastes in the end.
            assert len(s.block_table) <= blocks_for(min(s.end_length, len(s.token_ids) + BLOCKS_AHEAD * BLOCK_SIZE))
        if plan.preempted and 2 * simulation.pool.num_free_blocks <= simulation.pool.num_blocks:
            assert all(len(s.block_table) <= blocks_for(len(s.token_ids)) for s in simulation.running)


@given(loads())
@settings(max_examples=60, deadline=None)
def test_whoever_is_first_is_never_overtaken_at_admission(load: dict[str, Any]) -> None:
    simulation = make_simulation(**load)
    simulation.run()
    first = [sequence.admitted_at for sequence in sorted(simulation.finished, key=lambda sequence: sequence.arrival)]
    assert first == sorted(first)


@given(loads())
@settings(max_examples=40, deadline=None)
def test_plans_are_deterministic(load: dict[str, Any]) -> None:
    def plans() -> list[object]:
        simulation = make_simulation(**load)
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
