"""Paged attention against dense attention, and how sequences are grouped."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.hashing import BLOCK_SIZE
from worker_svc.attention import MAX_GATHERED_BYTES, MAX_WASTED_KEYS, attend, group_sequences, plan_group
from worker_svc.backends.backend import AttentionKind

CPU = torch.device("cpu")
KEY_BYTES = 1024
LENS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3000)), min_size=1, max_size=40)


@given(LENS)
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_in_one_group_of_its_kind_within_the_limits(lens: list[tuple[int, int]]) -> None:
    query_lens = [query for query, _ in lens]
    seq_lens = [query + before for query, before in lens]
    groups = group_sequences(query_lens, seq_lens, key_bytes=KEY_BYTES)
    assert sorted(i for group in groups for i in group) == list(range(len(lens)))
    for group in groups:
        longest = max(seq_lens[i] for i in group)
        assert len({query_lens[i] for i in group}) == 1
        assert sum(query_lens[i] * (longest - seq_lens[i]) for i in group) <= MAX_WASTED_KEYS
        assert len(group) == 1 or len(group) * longest * KEY_BYTES <= MAX_GATHERED_BYTES


def test_similar_decodes_attend_together() -> None:
    assert group_sequences([1, 1, 1], [100, 103, 99], key_bytes=KEY_BYTES) == [[1, 0, 2]]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """The formula in float64. `q`: [n, H, D], the last tokens of `k` and `v`: [s, KH, D]. Returns [n, H * D]."""
    num_queries, num_heads, head_dim = q.shape
    k, v = (x.double().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,shd->hns", q.double(), k) / head_dim**0.5
    queries = torch.arange(len(k) - num_queries, len(k))[:, None]
    keys = torch.arange(len(k))[None]
    unseen = (keys > queries) | (keys <= queries - (window or len(k) + 1))
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hns,shd->nhd", weights, v).reshape(num_queries, -1).float()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize(
    ("num_queries", "seq_lens"),
    [(1, [1]), (1, [17, 1, 40]), (3, [3, 3]), (5, [15, 16, 17]), (17, [17]), (16, [33, 100]), (37, [37, 40])],
    ids=str,
)
def test_paged_attention_is_dense_attention(
    heads: tuple[int, int], window: int | None, num_queries: int, seq_lens: list[int]
) -> None:
    (num_heads, num_kv_heads), head_dim, num_blocks = heads, 6, 24
    torch.manual_seed(0)
    q = torch.randn(num_queries * len(seq_lens), num_heads, head_dim)
    kv = torch.full((2 * num_kv_heads, num_blocks * BLOCK_SIZE, head_dim), torch.nan)
    free = random.Random(0).sample(range(num_blocks), num_blocks)
    expected, tables = [], []
    for i, length in enumerate(seq_lens):
        table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        k, v = torch.randn(length, num_kv_heads, head_dim), torch.randn(length, num_kv_heads, head_dim)
        kv[:, slots] = torch.cat([k, v], dim=1).transpose(0, 1)
        expected.append(dense(q[i * num_queries : (i + 1) * num_queries], k, v, window))
        tables.append(table)
    group = plan_group(0, num_queries, seq_lens, tables, window=window, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(
        attend(q, kv, [group], AttentionKind(q.shape[-1] ** -0.5, window)), torch.cat(expected), rtol=1e-5, atol=1e-5
    )


def test_window_bounds_what_is_gathered() -> None:
    tables = [list(range(63))]
    group = plan_group(0, 1, [1000], tables, window=10, dtype=torch.float32, device=CPU)
    assert group.key_slots.tolist() == list(range(990, 1000))
    assert group.mask is None


def test_padding_reads_only_the_sequence_itself() -> None:
    group = plan_group(0, 1, [3, 20], [[7], [4, 2]], window=None, dtype=torch.float32, device=CPU)
    slots = group.key_slots.view(2, 20).tolist()
    assert set(slots[0]) == {112, 113, 114}
    assert group.mask is not None
    assert (group.mask[0, 0, 0] == 0).sum() == 3
