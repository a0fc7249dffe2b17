"""Rotary positions against their formulas."""

from __future__ import annotations

import pytest
import torch

from worker_svc import rope
from worker_svc.rope import Linear, Llama3, LongRope, Rope, Yarn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_interleaved_pairs_is_rotating_halves(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head_dim, positions = 10, torch.tensor([0, 3, 1000])
    x = torch.randn(3, 2, head_dim, dtype=dtype)
    frequencies = rope.frequencies(Rope(10000.0), head_dim)
    angles = torch.outer(positions.float(), frequencies).unsqueeze(1)
    left, right = x.float().chunk(2, dim=-1)
    halves = (left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin())
    expected = torch.stack(halves, dim=-1).flatten(-2).to(dtype)
    pairs = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
    rope.rotate_(pairs, rope.turns(positions, frequencies))
    torch.testing.assert_close(pairs, expected)


def test_interleaving_orders_the_rotated_channels_of_every_head_and_no_others() -> None:
    assert rope.interleaved_order(2, 6, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert rope.interleaved_order(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert rope.interleaved_order(1, 4, 0).tolist() == [0, 1, 2, 3]


def test_linear_scaling_divides_all_frequencies() -> None:
    plain, scaled = rope.frequencies(Rope(100.0), 8), rope.frequencies(Rope(100.0, Linear(4.0)), 8)
    torch.testing.assert_close(scaled, plain / 4)


def test_llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    plain = rope.frequencies(Rope(500000.0), 64)
    scaled = rope.frequencies(Rope(500000.0, Llama3(8.0, 1.0, 4.0, 8192)), 64)
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    plain = rope.frequencies(Rope(10000.0), 64)
    scaled = rope.frequencies(Rope(10000.0, Yarn(40.0, 32.0, 1.0, 4096, 1.0)), 64)
    turns = 4096 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 32], plain[turns > 32])
    # The ramp ends at the first whole pair that turns less than once.
    slow = (turns < 1).nonzero().flatten()[1:]
    torch.testing.assert_close(scaled[slow], plain[slow] / 40)
    between = (turns > 1.5) & (turns < 20)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 40))[between].all()


def test_a_yarn_ramp_of_no_width_is_a_step() -> None:
    plain = rope.frequencies(Rope(10.0), 8)
    scaled = rope.frequencies(Rope(10.0, Yarn(4.0, 1.0, 1.0, 16, 1.0, is_truncated=False)), 8)
    assert set((plain / scaled).round().tolist()) == {1.0, 4.0}


def test_longrope_divides_each_frequency_by_its_factor() -> None:
    plain, scaled = (rope.frequencies(Rope(100.0, scaling), 4) for scaling in (None, LongRope((2.0, 5.0), True, 1.2)))
    torch.testing.assert_close(scaled, plain / torch.tensor([2.0, 5.0]))


def test_turned_vectors_grow_by_the_attention_factor() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(3, 2, 8), torch.tensor([0, 5, 900])
    turned = x.clone()
    rope.rotate_(turned, rope.turns(positions, rope.frequencies(Rope(100.0), 8), 1.5))
    torch.testing.assert_close(turned.norm(dim=-1), 1.5 * x.norm(dim=-1))
