"""Rotated heads and the written cache against `rope.rotate_` and a copy."""

from __future__ import annotations

import pytest
import torch

from worker_svc import rope
from worker_svc.cpu_kernels.rotate_and_write import rotate_and_write

# Query heads, KV heads, channels, of which rotated.
HEADS = [(1, 1, 8, 8), (4, 2, 20, 20), (3, 1, 6, 4), (6, 2, 64, 32), (5, 5, 2, 2)]


def make_turns(num_rows: int, num_rotated: int) -> torch.Tensor:
    frequencies = rope.frequencies(rope.Rope(100.0), num_rotated)
    return rope.turns(torch.randint(1000, (num_rows,)), frequencies, 1.1)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 13, 257])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_are_rotated_and_keys_and_values_written(
    num_rows: int, heads: tuple[int, int, int, int], num_threads: int
) -> None:
    num_heads, num_kv_heads, size, num_rotated = heads
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * size)
    turns, slots = make_turns(num_rows, num_rotated), torch.randperm(300)[:num_rows]
    kv, expected_kv = (torch.full((2 * num_kv_heads, 300, size), torch.nan) for _ in range(2))
    expected = qkv.clone().view(num_rows, num_heads + 2 * num_kv_heads, size)
    if num_rows:
        rope.rotate_(expected[:, : num_heads + num_kv_heads, :num_rotated], turns)
    expected_kv[:, slots] = expected[:, num_heads:].transpose(0, 1)
    q = rotate_and_write(qkv, turns, slots, kv)
    assert q.shape == (num_rows, num_heads, size) and q.data_ptr() == qkv.data_ptr()
    # Sums of two products; slots of nobody are as they were.
    torch.testing.assert_close(q, expected[:, :num_heads], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kv, expected_kv, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_slot(value: float) -> None:
    qkv, kv, slots = torch.randn(5, 4 * 8), torch.zeros(2, 40, 8), torch.tensor([7, 30, 2, 39, 0])
    qkv[2, 3], qkv[2, 17], qkv[2, 25] = value, value, value
    q = rotate_and_write(qkv, make_turns(5, 8), slots, kv)
    assert q.isfinite().all((1, 2)).tolist() == [True, True, False, True, True]
    assert (~kv.isfinite()).any(2).nonzero().tolist() == [[0, 2], [1, 2]]


def test_other_shapes_types_and_layouts_are_refused() -> None:
    qkv, kv, slots = torch.zeros(3, 4 * 8), torch.zeros(2, 40, 8), torch.zeros(3, dtype=torch.int64)
    turns = make_turns(3, 8)
    for bad in (qkv[:, :31], qkv[:, :16].contiguous(), qkv.double(), torch.zeros(3, 64)[:, :32]):
        with pytest.raises(ValueError, match=r"qkv: expected contiguous torch.float32 of shape \[3, "):
            rotate_and_write(bad, turns, slots, kv)
    for bad in (turns[:2], turns[:, 0], turns.to(torch.complex128), make_turns(3, 10)):
        with pytest.raises(ValueError, match=r"turns: expected contiguous torch.complex64 of shape \[3, 1, 4\]"):
            rotate_and_write(qkv, bad, slots, kv)
    for bad in (slots[:2], slots.int()):
        with pytest.raises(ValueError, match=r"slots: expected contiguous torch.int64 of shape \[3\]"):
            rotate_and_write(qkv, turns, bad, kv)
