"""Which steps are drafted for, and how much."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from tests.support.engine_requests import make_sequence
from weft.hashing import BLOCK_SIZE
from worker_svc.batch import Limits, StepPlan, plan_step
from worker_svc.blocks import BlockPool
from worker_svc.sequence import Sequence
from worker_svc.speculation.speculation import StepOutcome, draft_step


class Ones:
    """Drafts as many ones as it may, and remembers how many."""

    max_length = 4
    waits = True

    def __init__(self, rests: bool = False) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self._rests = rests

    def rests(self) -> bool:
        return self._rests

    def draft(self, sequences: Ordered[Sequence], rooms: Ordered[int], max_drafts: int) -> list[Ordered[int]]:
        self.asked.append((list(rooms), max_drafts))
        return [[1] * room for room in rooms]

    def observe(self, outcome: StepOutcome) -> None:
        raise AssertionError("nothing was computed")

    def forget(self, sequence: Sequence) -> None:
        raise AssertionError("nothing has ended")


def plan_decodes(*sequences: Sequence, num_blocks: int = 64) -> tuple[StepPlan, BlockPool]:
    """A step in which each of them lacks its last token alone."""
    pool, running = BlockPool(num_blocks), list[Sequence]()
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=512)
    for sequence, count in plan_step(list(sequences), running, pool, limits, 0.0).num_scheduled_tokens.items():
        sequence.num_computed_tokens += count
        sequence.token_ids.append(9)
    return plan_step([], running, pool, limits, 0.0), pool


def draft(ones: Ones, plan: StepPlan, pool: BlockPool, budget: int = 64) -> dict[Sequence, Ordered[int]] | None:
    num_running = len(plan.num_scheduled_tokens)
    return draft_step(ones, plan, pool, num_running=num_running, max_num_batched_tokens=budget)


def test_decodes_are_drafted_for_up_to_their_end_and_the_budget() -> None:
    ones = Ones()
    long, short = make_sequence([5] * 8), make_sequence([5] * 8, end_length=11)
    plan, pool = plan_decodes(long, short)
    assert draft(ones, plan, pool, budget=10) == {long: [1, 1, 1, 1], short: [1]}
    assert ones.asked == [([4, 1], 8)]


def test_sequence_without_a_draft_is_not_among_them() -> None:
    ones, last = Ones(), make_sequence([5] * 8, end_length=10)
    plan, pool = plan_decodes(last)
    assert draft(ones, plan, pool) == {}


def test_step_with_a_prompt_is_not_drafted_for() -> None:
    ones, pool = Ones(), BlockPool(8)
    plan = plan_step([make_sequence([5] * 8)], [], pool, Limits(8, 512), 0.0)
    assert draft(ones, plan, pool) == {} and not ones.asked


def test_token_that_is_not_known_cannot_be_drafted_after() -> None:
    ones, sequence = Ones(), make_sequence([5] * 8)
    plan, pool = plan_decodes(sequence)
    sequence.num_pending_tokens = 1
    assert draft(ones, plan, pool) == {} and not ones.asked


def test_step_that_a_drafter_rests_in_is_left_alone() -> None:
    ones = Ones(rests=True)
    plan, pool = plan_decodes(make_sequence([5] * 8))
    assert draft(ones, plan, pool) is None and not ones.asked


def test_drafts_have_blocks_to_be_written_to_and_leave_one_for_each_sequence() -> None:
    ones, sequence = Ones(), make_sequence([5] * (BLOCK_SIZE - 2))
    plan, pool = plan_decodes(sequence, num_blocks=2)
    # One token more fits the block; the free one is spared.
    assert draft(ones, plan, pool) == {sequence: [1]}
    pool.check([sequence.block_table])
