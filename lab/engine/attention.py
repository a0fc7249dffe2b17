"""Attention: the backend's kernels against torch over runs of slots, and against gathering keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lab.engine.models import NANO, SMALL, Shape
from lab.engine.race import race, rivals
from lab.report import Figure
from weft.hashing import BLOCK_SIZE
from worker_svc import attention
from worker_svc.attention_plan import Unit, find_families, plan_units
from worker_svc.backends.backend import AttentionKind
from worker_svc.cpu_kernels.attention import AttentionPlan, attend
from worker_svc.cpu_kernels.launch import Launches, record
from worker_svc.runner import MAX_RECORDED_ROWS
from worker_svc.step_input import StepInput

# So many layers in turn that their caches do not stay in the processor's.
NUM_LAYERS = 4
ROUNDS = 21
# After long contexts torch is as fast for prefills, but for noise.
DECODE_BAR, PREFILL_BAR = 1.0, 0.97


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences alike in one step."""

    shape: Shape
    num_sequences: int
    num_before: int  # tokens of each before the step
    num_queries: int  # of each in the step
    num_shared: int = 0  # of the tokens before

    def __str__(self) -> str:
        shared = f", {self.num_shared} shared" if self.num_shared else ""
        return f"{self.shape.name}, {self.num_sequences} x {self.num_queries} after {self.num_before}{shared}"

    def step(self) -> StepInput:
        """With tables whose blocks are in a row."""
        length = self.num_before + self.num_queries
        num_shared = self.num_shared // BLOCK_SIZE
        num_own = -(-length // BLOCK_SIZE) - num_shared
        prefix = list(range(num_shared))
        tables = [
            prefix + list(range(num_shared + i * num_own, num_shared + (i + 1) * num_own))
            for i in range(self.num_sequences)
        ]
        count = self.num_sequences
        return StepInput([], [], [], [self.num_queries] * count, [length] * count, tables, [])


@dataclass(frozen=True, slots=True)
class Replay:
    """Recorded launches, with what they read: of that they hold addresses only."""

    launches: Launches
    num_rows: int
    read: tuple[object, ...]

    def __call__(self) -> None:
        self.launches.run(torch.get_num_threads(), self.num_rows)


CASES = (
    Case(SMALL, 1, 192, 1),
    Case(SMALL, 1, 4000, 1),
    Case(SMALL, 16, 160, 1),
    Case(SMALL, 16, 1024, 1),
    Case(SMALL, 16, 1056, 1, num_shared=1024),
    Case(SMALL, 1, 0, 256),
    Case(SMALL, 1, 768, 256),
    Case(SMALL, 1, 2048, 256),
    Case(SMALL, 8, 1024, 32, num_shared=1024),
    Case(NANO, 1, 192, 1),
    Case(NANO, 16, 160, 1),
)


def kernels_against_torch() -> list[Figure]:
    """A layer's attention by kernels, by torch's products of matrices, and by a copy of all keys and values."""
    figures = []
    for case in CASES:
        step = case.step()
        units = plan_units(find_families(step), step, None)
        ways = {
            "kernels": _by_kernels(case, step, units),
            "torch over runs": _by_torch(case, step, units),
            "gathering": _by_gathering(case, step),
        }
        bar = DECODE_BAR if case.num_queries == 1 else PREFILL_BAR
        figures += rivals(f"attention of {case}", race(ways, ROUNDS), "kernels", bar)
    return figures


def few_runs_against_many() -> list[Figure]:
    """What it is worth that a sequence takes its blocks together: 16 that took them in turn have a run for each."""
    case = Case(SMALL, 16, 160, 1)
    together, in_turn = case.step(), case.step()
    for i, table in enumerate(in_turn.block_tables):
        table[:] = [i + case.num_sequences * number for number in range(len(table))]
    steps = {"blocks together": together, "blocks in turn": in_turn}
    ways = {name: _by_kernels(case, step, plan_units(find_families(step), step, None)) for name, step in steps.items()}
    return rivals(f"attention of {case}", race(ways, ROUNDS), "blocks together")


def _by_kernels(case: Case, step: StepInput, units: Sequence[Unit]) -> Callable[[], object]:
    """As in a step: few rows are recorded launches, many are launched one by one."""
    q, caches, kind = _tensors(case, step)
    plan = AttentionPlan(step, find_families(step))

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return [attend(q, cache, plan, kind) for cache in caches][-1]

    if len(q) > MAX_RECORDED_ROWS:
        return run
    launches, _ = record(run)
    return Replay(launches, len(q), (q, caches, plan))


def _by_torch(case: Case, step: StepInput, units: Sequence[Unit]) -> Callable[[], None]:
    q, caches, kind = _tensors(case, step)

    @torch.inference_mode()
    def run() -> None:
        for cache in caches:
            attention.attend(q, cache, units, kind)

    return run


def _by_gathering(case: Case, step: StepInput) -> Callable[[], None]:
    q, caches, kind = _tensors(case, step)
    shape, count, length = case.shape, case.num_sequences, step.seq_lens[0]
    slots = torch.tensor(
        [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for table in step.block_tables for p in range(length)]
    )
    queries = q.view(count, case.num_queries, shape.num_heads, shape.head_dim).transpose(1, 2)
    mask = torch.ones(case.num_queries, length).tril(case.num_before).log()

    @torch.inference_mode()
    def run() -> None:
        for cache in caches:
            gathered = cache.index_select(1, slots).view(2, shape.num_kv_heads, count, length, shape.head_dim)
            keys, values = gathered.transpose(1, 2).unbind(0)
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=kind.softmax_scale, enable_gqa=True
            )

    return run


def _tensors(case: Case, step: StepInput) -> tuple[torch.Tensor, list[torch.Tensor], AttentionKind]:
    shape = case.shape
    num_slots = (1 + max(block for table in step.block_tables for block in table)) * BLOCK_SIZE
    caches = [torch.randn(2 * shape.num_kv_heads, num_slots, shape.head_dim) for _ in range(NUM_LAYERS)]
    q = torch.randn(case.num_sequences * case.num_queries, shape.num_heads, shape.head_dim)
    return q, caches, AttentionKind(shape.head_dim**-0.5)
