"""Sequences in a paged cache, and what attention over them is."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import MIN_SHARED_BLOCKS, find_families, order_rows
from worker_svc.backends.backend import AttentionKind
from worker_svc.cpu_kernels.segments import Group, plan_groups
from worker_svc.step_input import StepInput

NUM_SLOTS = 120 * BLOCK_SIZE


class AttentionStep:
    """Sequences with random K and V in scattered blocks, of which some are neighbours; NaN where nobody is."""

    def __init__(self, seed: int, lengths: Iterable[tuple[int, int]], heads: tuple[int, int, int]) -> None:
        """`heads`: of queries, of KV, and channels."""
        self.num_heads, num_kv_heads, self.head_dim = heads
        self.kv = torch.full((2 * num_kv_heads, NUM_SLOTS, self.head_dim), torch.nan)
        starts = random.Random(seed).sample(range(0, 120, 3), 40)
        self._free = [start + i for start in starts for i in range(3)][::-1]
        self.step = StepInput([], [], [], [], [], [], [])
        self.slots: list[list[int]] = []
        for count, length in lengths:
            self._add(count, length, [])
        self.q = torch.randn(sum(self.step.query_lens), self.num_heads, self.head_dim)

    def _add(self, count: int, length: int, table: list[int]) -> None:
        table = table + [self._free.pop() for _ in range(-(-length // BLOCK_SIZE) - len(table))]
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        self.kv[:, slots] = torch.randn(len(self.kv), length, self.head_dim)
        self.slots.append(slots)
        self.step.query_lens.append(count)
        self.step.seq_lens.append(length)
        self.step.block_tables.append(table)

    def add_sharing(self, count: int, length: int) -> None:
        """One more sequence, with the first blocks of the first one."""
        shared = self.kv[:, self.slots[0]].clone()
        self._add(count, length, self.step.block_tables[0][:MIN_SHARED_BLOCKS])
        self.kv[:, self.slots[0]] = shared
        self.q = torch.cat([self.q, torch.randn(count, self.num_heads, self.head_dim)])

    def groups(self, window: int | None) -> list[Group]:
        families = find_families(self.step)
        assert order_rows(families, self.step.query_lens) == list(range(len(self.q)))
        return list(plan_groups(families, self.step, window))

    def expected(self, kind: AttentionKind) -> torch.Tensor:
        """[T, H * D], row by row in float64."""
        rows = []
        for slots, count in zip(self.slots, self.step.query_lens, strict=True):
            for end in range(len(slots) - count + 1, len(slots) + 1):
                seen = slots[max(0, end - (kind.window or end)) : end]
                cached = self.kv[:, seen].double().repeat_interleave(2 * self.num_heads // len(self.kv), 0)
                keys, values = cached.chunk(2)
                scores = torch.einsum("hd,hsd->hs", self.q[len(rows)].double(), keys) * kind.softmax_scale
                if kind.soft_cap is not None:
                    scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
                rows.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), values).flatten())
        return torch.stack(rows).float()

    def empty(self) -> torch.Tensor:
        """[T, H * D] for a kernel to write, its rows apart from each other."""
        return torch.empty(len(self.q), self.num_heads * self.head_dim + 16)[:, :-16]
