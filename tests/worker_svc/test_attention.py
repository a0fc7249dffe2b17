"""Attention over runs of slots against the formula."""

from __future__ import annotations

import random

import pytest
import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.attention import MAX_SCORE_BYTES, attend
from worker_svc.attention_plan import MIN_SHARED_BLOCKS, find_families, order_rows, plan_units
from worker_svc.backends.backend import AttentionKind
from worker_svc.step_input import StepInput

HEAD_DIM = 8


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
    """The formula in float64. `q`: [n, H, D], the last tokens of `k` and `v`: [s, KH, D]. Returns [n, H * Dv]."""
    num_queries, num_heads, _ = q.shape
    k, v = (x.double().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q.double(), k) * kind.softmax_scale
    if kind.soft_cap is not None:
        scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
    queries = torch.arange(len(k) - num_queries, len(k))[:, None]
    keys = torch.arange(len(k))[None]
    unseen = (keys > queries) | (keys <= queries - (kind.window or len(k) + 1))
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hns,shd->nhd", weights, v).reshape(num_queries, -1).float()


class Sequences:
    """Sequences of random K and V in scattered blocks; what nobody owns is not a number."""

    def __init__(self, heads: tuple[int, int], kind: AttentionKind, seed: int, num_blocks: int = 120) -> None:
        self._num_heads, num_kv_heads = heads
        self._kind = kind
        num_planes = num_kv_heads if kind.value_dim else 2 * num_kv_heads
        self._kv = torch.full((num_planes, num_blocks * BLOCK_SIZE, HEAD_DIM), torch.nan)
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)
        self._step = StepInput([], [], [], [], [], [], [])
        self._q: list[torch.Tensor] = []
        self._expected: list[torch.Tensor] = []
        torch.manual_seed(seed)

    def add(self, count: int, length: int, like: int | None = None) -> None:
        """A sequence with `count` tokens in the step and `length` in all, with the first blocks of another's."""
        table = self._step.block_tables[like][:MIN_SHARED_BLOCKS] if like is not None else []
        num_shared = len(table) * BLOCK_SIZE
        table = table + [self._free.pop() for _ in range(-(-length // BLOCK_SIZE) - len(table))]
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        self._kv[:, slots[num_shared:]] = torch.randn(len(self._kv), length - num_shared, HEAD_DIM)
        self._q.append(torch.randn(count, self._num_heads, HEAD_DIM))
        cached = self._kv[:, slots].transpose(0, 1)
        width = self._kind.value_dim
        k, v = cached.chunk(2, dim=1) if width is None else (cached, cached[..., :width])
        self._expected.append(dense(self._q[-1], k, v, self._kind))
        self._step.query_lens.append(count)
        self._step.seq_lens.append(length)
        self._step.block_tables.append(table)

    def check(self, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
        """Tolerance: of sums of products of about one, in the type."""
        families = find_families(self._step)
        rows = order_rows(families, self._step.query_lens)
        units = plan_units(families, self._step, self._kind.window)
        attended = attend(torch.cat(self._q)[rows].to(dtype), self._kv.to(dtype), units, self._kind)
        expected = torch.cat(self._expected)[rows]
        torch.testing.assert_close(attended.float(), expected, rtol=tolerance, atol=tolerance)


HEADS = [(4, 4), (4, 2), (8, 2), (3, 1)]
KINDS = [
    *(AttentionKind(HEAD_DIM**-0.5, window) for window in (None, 1, 5, 16, 1000)),
    AttentionKind(0.5, 16, soft_cap=2.0),
    AttentionKind(0.5, soft_cap=2.0),
]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_of_decodes_and_chunks_are_the_formula(heads: tuple[int, int], kind: AttentionKind, seed: int) -> None:
    sequences = Sequences(heads, kind, seed)
    for count, length in ((1, 1), (1, 40), (1, 33), (3, 3), (5, 17), (17, 17), (16, 100), (37, 40), (2, 16)):
        sequences.add(count, length)
    sequences.check()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sequences_with_a_common_prefix_are_the_formula(kind: AttentionKind, seed: int) -> None:
    sequences = Sequences((4, 2), kind, seed)
    sequences.add(1, MIN_SHARED_BLOCKS * BLOCK_SIZE + 30)
    for count, more in ((1, 1), (1, 18), (7, 7), (20, 33)):
        sequences.add(count, MIN_SHARED_BLOCKS * BLOCK_SIZE + more, like=0)
    sequences.check()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_chunk_with_more_scores_than_are_kept_is_the_formula(kind: AttentionKind, seed: int) -> None:
    count, length = 300, 700
    assert count * length * 4 * 4 > MAX_SCORE_BYTES
    sequences = Sequences((4, 2), kind, seed)
    sequences.add(count, length)
    sequences.add(1, 90)
    sequences.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_the_formula(dtype: torch.dtype, seed: int) -> None:
    sequences = Sequences((4, 2), AttentionKind(HEAD_DIM**-0.5, 40), seed)
    for count, length in ((1, 1), (1, 90), (30, 100)):
        sequences.add(count, length)
    # bfloat16 has 8 bits of mantissa.
    sequences.check(dtype, tolerance=3e-2)


def test_values_may_be_the_first_channels_of_the_keys(seed: int) -> None:
    sequences = Sequences((6, 1), AttentionKind(0.3, value_dim=5), seed)
    for count, length in ((1, 50), (12, 60), (20, 20)):
        sequences.add(count, length)
    sequences.check()
