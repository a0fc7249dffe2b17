"""Rows of the embedding and angles against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker_svc import rope
from worker_svc.cpu_kernels.inputs import embed, turns

ROWS = (0, 1, 2, 13, 257)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("size", "scale"), [(1, 1.0), (50, 1.0), (64, 7.1), (1024, 0.3)])
def test_rows_are_those_of_the_table_times_a_number(num_rows: int, size: int, scale: float, num_threads: int) -> None:
    table, token_ids = torch.randn(31, size), torch.randint(31, (num_rows,))
    found = embed(token_ids, table, scale)
    # One rounding, and that of the number to float32.
    torch.testing.assert_close(found, F.embedding(token_ids, table) * scale, rtol=3e-7, atol=0)


def test_what_is_not_finite_stays_in_its_row() -> None:
    table = torch.randn(5, 20)
    table[1, 3], table[2, 4] = torch.nan, torch.inf
    found = embed(torch.tensor([0, 1, 2, 3]), table, 2.0)
    assert found.isfinite().all(1).tolist() == [True, False, False, True]
    assert found[1, 3].isnan() and found[2, 4] == torch.inf


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("num_pairs", "factor"), [(1, 1.0), (5, 1.3), (32, 1.0), (64, 0.7)])
def test_turns_are_those_of_torch(num_rows: int, num_pairs: int, factor: float, num_threads: int) -> None:
    positions = torch.randint(200_000, (num_rows,))
    frequencies = rope.frequencies(rope.Rope(10_000.0), 2 * num_pairs)
    found = turns(positions, frequencies, factor)
    assert found.shape == (num_rows, 1, num_pairs)
    # A few units in the last place: that of the angle, a float32 product, is the same on both sides.
    torch.testing.assert_close(found, rope.turns(positions, frequencies, factor), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 131_071, 2**24])
def test_far_positions_are_exact(position: int) -> None:
    frequencies = torch.rand(17)
    found = turns(torch.tensor([position]), frequencies, 1.0)[0, 0]
    angles = (torch.tensor(float(position)) * frequencies).double()
    expected = torch.polar(torch.ones(17, dtype=torch.float64), angles)
    # Two units in the last place of one.
    torch.testing.assert_close(found.to(torch.complex128), expected, rtol=0, atol=1.2e-7)


def test_other_shapes_types_and_layouts_are_refused() -> None:
    ids, table, frequencies = torch.zeros(3, dtype=torch.int64), torch.zeros(5, 4), torch.ones(4)
    for bad_ids in (ids.int(), ids.view(3, 1), ids.repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"token_ids: expected contiguous torch.int64 of shape \[3\]"):
            embed(bad_ids, table, 1.0)
        with pytest.raises(ValueError, match=r"positions: expected contiguous torch.int64 of shape \[3\]"):
            turns(bad_ids, frequencies, 1.0)
    for bad_table in (table.double(), table.t(), table.flatten()):
        with pytest.raises(ValueError, match="table: expected"):
            embed(ids, bad_table, 1.0)
    with pytest.raises(ValueError, match="frequencies: expected"):
        turns(ids, frequencies.double(), 1.0)
