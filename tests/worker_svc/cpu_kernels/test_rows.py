"""Rows that are copied against `index_select`."""

from __future__ import annotations

import pytest
import torch

from worker_svc.cpu_kernels.rows import take_rows


@pytest.mark.parametrize("shape", [(7, 1), (7, 33), (7, 3, 8)], ids=str)
@pytest.mark.parametrize("rows", [[], [6], [3, 3, 0, 6, 1]], ids=str)
def test_rows_come_in_the_order_asked_for(shape: tuple[int, ...], rows: list[int], num_threads: int) -> None:
    x, index = torch.randn(shape), torch.tensor(rows, dtype=torch.int64)
    assert take_rows(x, index).equal(x[index])


def test_rows_may_be_apart() -> None:
    wide = torch.randn(5, 9, 4)
    x = wide[:, :6]
    found = take_rows(x, torch.tensor([4, 1]))
    assert found.equal(x[[4, 1]]) and found.is_contiguous()


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 3).t(), torch.zeros(3, 8)[:, ::2]], ids=str
)
def test_other_tensors_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x: expected rows of torch.float32"):
        take_rows(x, torch.tensor([0]))


def test_other_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: expected"):
        take_rows(torch.zeros(3, 4), torch.tensor([0], dtype=torch.int32))
