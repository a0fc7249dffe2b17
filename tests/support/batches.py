"""Plays `plan_step` step after step without an engine: computes what is planned, and appends tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.engine_requests import make_sequence
from weft.hashing import chain_root
from worker_svc.batch import Limits, StepPlan, commit_blocks, plan_step
from worker_svc.blocks import BlockPool
from worker_svc.sequence import Sequence, State

ROOT = chain_root(b"digest")


@dataclass
class Simulation:
    """The engine's books."""

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
            assert len(sequence.block_table) >= self.pool.blocks_for(sequence.num_computed_tokens + count)
            sequence.num_computed_tokens += count
            commit_blocks(sequence, self.pool)
            if not sequence.num_uncomputed_tokens:
                sequence.token_ids.append(sequence.seed)
                if sequence.is_complete:
                    self.running.remove(sequence)
                    self.pool.free(sequence.release())
                    self.finished.append(sequence)
        self.pool.check(sequence.block_table for sequence in self.running)
        return plan

    def run(self, steps: int = 3000) -> None:
        for _ in self.steps(steps):
            pass

    def steps(self, at_most: int = 3000) -> Iterator[tuple[list[Sequence], StepPlan]]:
        """Step until all have ended; with each plan the sequences of which one token was to be computed before it."""
        while self.waiting or self.running:
            assert at_most, "somebody starves"
            at_most -= 1
            decodes = [sequence for sequence in self.running if sequence.num_uncomputed_tokens == 1]
            yield decodes, self.step()


def make_simulation(
    lengths: list[tuple[int, int]], *, num_blocks: int = 64, shared: int = 0, root: bool = True, **limits: Any
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
