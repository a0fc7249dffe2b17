"""Attention of many rows to the cache against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.attention_step import AttentionStep
from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import MIN_SHARED_BLOCKS
from worker_svc.backends.backend import AttentionKind
from worker_svc.cpu_kernels.register_tiles import PANEL
from worker_svc.cpu_kernels.tiled_attention import KEYS, MAX_ROWS, TilePlan, can_attend, tiled_attention

# Tokens in the step and in all: around a tile's rows and keys, a piece's rows, and a window's.
LENGTHS = ((1, 50), (2, 2), (5, 5), (13, 70), (12, KEYS), (33, KEYS + 1), (MAX_ROWS, MAX_ROWS), (MAX_ROWS + 1, 150))
HEADS = ((2, 2, PANEL), (6, 2, 2 * PANEL), (4, 1, PANEL), (3, 1, 3 * PANEL))


def attend(step: AttentionStep, kind: AttentionKind) -> torch.Tensor:
    out = step.empty()
    plan = TilePlan(step.groups(kind.window))
    tiled_attention(step.q, step.kv, plan, out, softmax_scale=kind.softmax_scale, soft_cap=kind.soft_cap)
    return out


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 16, 70, 1000])
def test_rows_are_the_formula(seed: int, heads: tuple[int, int, int], window: int | None, num_threads: int) -> None:
    step, kind = AttentionStep(seed, LENGTHS, heads), AttentionKind(heads[2] ** -0.5, window)
    # Weighted means of values of about one, in float32.
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("soft_cap", [0.5, 2.0, 50.0])
def test_capped_scores_are_the_formula(seed: int, window: int | None, soft_cap: float) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, PANEL)), AttentionKind(0.5, window, soft_cap)
    # A cap costs as many units in the last place as it is large.
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=1e-5, atol=1e-5 * (1 + soft_cap / 10))


@pytest.mark.parametrize("scale", [0.0, -1.0, 10.0])
def test_flat_and_steep_weights_are_the_formula(seed: int, scale: float) -> None:
    step, kind = AttentionStep(seed, LENGTHS, (6, 2, PANEL)), AttentionKind(scale)
    # Scores reach 300, of which float32 holds 3e-5.
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("own", [1, 4, 40])
def test_rows_of_sequences_with_a_common_prefix_are_the_formula(seed: int, own: int) -> None:
    shared = MIN_SHARED_BLOCKS * BLOCK_SIZE
    step, kind = AttentionStep(seed, [(own, shared + 50)], (6, 2, PANEL)), AttentionKind(0.2)
    for more in (own, own + 9, 60):
        step.add_sharing(own, shared + more)
    assert len(step.groups(None)) == 1
    torch.testing.assert_close(attend(step, kind), step.expected(kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_sequence_and_shows(seed: int, value: float) -> None:
    step, kind = AttentionStep(seed, [(20, 90), (70, 100), (5, 30)], (6, 2, PANEL)), AttentionKind(0.3)
    clean = attend(step, kind)
    # Of KV head 1: query heads 3, 4 and 5.
    step.kv[3, step.slots[1][7], 2] = value
    values = attend(step, kind)
    assert not values[20:90].view(70, 6, PANEL)[:, 3:, 2].isfinite().any()
    step.q[20:90, 3:, 5] = value
    scores = attend(step, kind)
    assert not scores[20:90].view(70, 6, PANEL)[:, 3:].isfinite().any()
    for found in (values, scores):
        assert found[:20].equal(clean[:20]) and found[90:].equal(clean[90:])
        assert found[20:90, : 3 * PANEL].equal(clean[20:90, : 3 * PANEL])


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_key_that_is_not_a_number_shows_in_all_who_see_it_and_in_no_other(seed: int, soft_cap: float | None) -> None:
    step = AttentionStep(seed, [(40, 100)], (6, 2, PANEL))
    step.kv[0, step.slots[0][80], 0] = torch.nan
    found = attend(step, AttentionKind(0.3, soft_cap=soft_cap)).view(40, 6, PANEL)
    assert found[:20].isfinite().all() and found[:, 3:].isfinite().all()
    assert found[20:, :3].isnan().all()


def test_heads_of_whole_panels_can_be_attended_to() -> None:
    assert [can_attend(size) for size in (PANEL, 3 * PANEL, PANEL // 2, PANEL + 8)] == [True, True, False, False]
