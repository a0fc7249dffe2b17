"""Attention of rows to the cache against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from tests.support.attention_step import AttentionStep
from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import MIN_SHARED_BLOCKS
from worker_svc.backends.backend import AttentionKind
from worker_svc.cpu_kernels.launch import address_of
from worker_svc.cpu_kernels.paged_attention import TILE, RowPlan, paged_attention
from worker_svc.cpu_kernels.segments import Group

# Tokens in the step and in all: decodes around a tile's and a block's length, and few causal rows.
LENGTHS = ((1, 1), (1, 16), (1, TILE - 1), (1, TILE), (1, 2 * TILE + 1), (1, 200), (2, 2), (3, 17), (4, 100), (4, 16))
WINDOWS = (None, 1, 5, 16, 70, 1000)


def attend(step: AttentionStep, kind: AttentionKind, groups: Iterable[Group] | None = None) -> torch.Tensor:
    out, plan = step.empty(), RowPlan(step.groups(kind.window) if groups is None else groups)
    paged_attention(step.q, step.kv, plan, out, softmax_scale=kind.softmax_scale, soft_cap=kind.soft_cap)
    return out


@pytest.mark.parametrize("heads", [(2, 2, 8), (6, 2, 8), (4, 1, 64), (2, 2, 80), (3, 1, 128), (8, 2, 80)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_rows_are_the_formula(seed: int, heads: tuple[int, int, int], window: int | None, num_threads: int) -> None:
    step, kind = AttentionStep(seed, LENGTHS, heads), AttentionKind(heads[2] ** -0.5, window)
    # Weighted means of values of about one, in float32.
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("soft_cap", [0.5, 2.0, 50.0])
def test_capped_scores_are_the_formula(seed: int, window: int | None, soft_cap: float, num_threads: int) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, 8)), AttentionKind(1.0, window, soft_cap)
    # A cap costs as many units in the last place as it is large.
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=1e-5, atol=1e-5 * (1 + soft_cap / 10))


@pytest.mark.parametrize("scale", [0.0, -1.0, 30.0])
def test_flat_and_steep_weights_are_the_formula(seed: int, scale: float) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, 8)), AttentionKind(scale)
    # Scores reach 300, of which float32 holds 3e-5.
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=3e-4, atol=3e-4)


def test_rows_of_sequences_with_a_common_prefix_are_the_formula(seed: int) -> None:
    step, kind = AttentionStep(seed, [(1, MIN_SHARED_BLOCKS * BLOCK_SIZE + 30)], (6, 2, 8)), AttentionKind(0.3)
    for count, more in ((1, 3), (1, 18), (2, 7)):
        step.add_sharing(count, MIN_SHARED_BLOCKS * BLOCK_SIZE + more)
    assert len(step.groups(None)) == 1
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=1e-5, atol=1e-5)


def test_rows_of_other_groups_are_left_alone(seed: int) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, 8)), AttentionKind(0.3)
    found, all_rows = attend(step, kind, step.groups(None)[1:8:2]), attend(step, kind)
    mine = [
        row for group in step.groups(None)[1:8:2] for row in range(group.first_row, group.first_row + group.num_rows)
    ]
    assert found[mine].equal(all_rows[mine])
    others = [row for row in range(len(found)) if row not in mine]
    assert found[others].isnan().all()
    assert attend(step, kind, []).isnan().all()


def test_heads_of_rows_may_be_apart(seed: int) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, 8)), AttentionKind(0.3)
    expected = attend(step, kind)
    step.q = torch.cat([step.q, torch.full((len(step.q), 4, 8), torch.nan)], 1)[:, :6]
    assert attend(step, kind).equal(expected)


def test_plan_stays_where_it_is_when_it_becomes_another(seed: int) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, 8)), AttentionKind(0.3)
    plan = RowPlan(step.groups(5))
    address = address_of(plan.addresses)
    plan.take(RowPlan(step.groups(None)))
    assert address_of(plan.addresses) == address
    assert (plan.num_rows, plan.num_keys) == (len(step.q), 1 + 16 + 63 + 64 + 129 + 200 + 3 + 48 + 394 + 58)
    out = torch.empty(len(step.q), 48)
    paged_attention(step.q, step.kv, plan, out, softmax_scale=0.3, soft_cap=None)
    assert out.equal(attend(step, kind))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [0, 99])
def test_what_is_not_finite_stays_in_its_sequence_and_shows(seed: int, value: float, key: int) -> None:
    step, kind = AttentionStep(seed, [(1, 90), (1, 100), (2, 30)], (6, 2, 8)), AttentionKind(0.3)
    clean = attend(step, kind)
    # Of KV head 1: query heads 3, 4 and 5.
    step.kv[3, step.slots[1][key], 2] = value
    values = attend(step, kind)
    assert not values[1].view(6, 8)[3:, 2].isfinite().any()
    step.q[1, 3:, 5] = value
    scores = attend(step, kind)
    assert not scores[1].view(6, 8)[3:].isfinite().any()
    for found in (values, scores):
        assert found[[0, 2, 3]].equal(clean[[0, 2, 3]]) and found[1, :24].equal(clean[1, :24])


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_key_that_is_not_a_number_shows_in_all_who_see_it_and_in_no_other(seed: int, soft_cap: float | None) -> None:
    step = AttentionStep(seed, [(4, 100)], (6, 2, 8))
    step.kv[0, step.slots[0][98], 0] = torch.nan
    found = attend(step, AttentionKind(0.3, soft_cap=soft_cap)).view(4, 6, 8)
    assert found[:2].isfinite().all() and found[:, 3:].isfinite().all()
    assert found[2:, :3].isnan().all()
    step.kv[0, step.slots[0][98], 0], step.kv[0, step.slots[0][10], 0] = 0.0, torch.nan
    assert attend(step, AttentionKind(0.3, 80, soft_cap)).isfinite().all()


def test_other_shapes_types_and_layouts_are_refused(seed: int) -> None:
    step, kind = AttentionStep(seed, [(1, 4)], (6, 2, 8)), AttentionKind(0.3)
    for bad in (torch.zeros(1, 5, 8), torch.zeros(1, 6, 4), torch.zeros(1, 8, 6).transpose(1, 2)):
        step.q = bad
        with pytest.raises(ValueError, match=r"q: expected rows of shape \[any \* 2, 8\]"):
            attend(step, kind)
    out = torch.zeros(1, 47)
    with pytest.raises(ValueError, match=r"out: expected contiguous rows of torch.float32, shape \[T, 48\]"):
        paged_attention(torch.zeros(1, 6, 8), step.kv, RowPlan(), out, softmax_scale=1.0, soft_cap=None)
