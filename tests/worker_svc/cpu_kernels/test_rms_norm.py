"""The norm against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from worker_svc.backends import torch_layers
from worker_svc.cpu_kernels.launch import empty_rows
from worker_svc.cpu_kernels.rms_norm import RmsNorm

ROWS = (0, 1, 2, 13, 257)
# One value, not a multiple of a vector, and rows that `empty_rows` keeps apart.
SIZES = (1, 7, 50, 1024)


def dense(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x`: [T, heads, D]."""
    x = x.double()
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).float()


def rows_of(values: torch.Tensor) -> torch.Tensor:
    rows = empty_rows(*values.shape)
    rows.copy_(values)
    return rows


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_the_formula(num_rows: int, size: int, num_threads: int) -> None:
    x, weight = rows_of(3 * torch.randn(num_rows, size)), torch.randn(size)
    before = x.clone()
    found = RmsNorm(weight, 1e-5)(x)
    assert found.stride() == x.stride() and x.equal(before)
    # Float32 sums of up to 1,024 squares.
    torch.testing.assert_close(found, dense(x, weight, 1e-5), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("num_heads", "size"), [(1, 8), (3, 20), (5, 64)])
def test_heads_are_normed_in_place_and_the_rest_of_a_row_is_left(
    num_rows: int, num_heads: int, size: int, num_threads: int
) -> None:
    x, weight = torch.randn(num_rows, (num_heads + 2) * size), torch.randn(num_heads, size)
    before, width = x.clone(), num_heads * size
    RmsNorm(weight, 1e-6).norm_(x)
    expected = dense(before[:, :width].reshape(num_rows, num_heads, size), weight, 1e-6)
    torch.testing.assert_close(x[:, :width], expected.flatten(1), rtol=3e-6, atol=1e-7)
    assert x[:, width:].equal(before[:, width:])


def test_norm_is_that_of_torch_for_small_and_large_values() -> None:
    weight, eps = torch.randn(33), 1e-6
    x = torch.randn(7, 33) * torch.tensor([0.0, 1e-30, 1e-4, 1e-3, 1.0, 1e6, 1e17])[:, None]
    torch.testing.assert_close(RmsNorm(weight, eps)(x), torch_layers.RmsNorm(weight, eps)(x), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_shows(value: float) -> None:
    x, norm = torch.randn(5, 40), RmsNorm(torch.randn(40), 1e-6)
    clean = norm(x)
    x[2, 17] = value
    found = norm(x)
    norm.norm_(x)
    for result in (found, x):
        assert not result[2, 17].isfinite()
        assert result[[0, 1, 3, 4]].equal(clean[[0, 1, 3, 4]])


def test_weights_of_other_types_and_layouts_are_taken() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16, 2)
    expected = dense(x, weight[:, 0], 1e-6)
    torch.testing.assert_close(RmsNorm(weight[:, 0], 1e-6)(x), expected)
    # The result is that of the weight rounded to 8 bits.
    torch.testing.assert_close(RmsNorm(weight[:, 0].bfloat16(), 1e-6)(x), expected, rtol=2**-8, atol=0)


def test_other_shapes_types_and_layouts_are_refused() -> None:
    norm = RmsNorm(torch.ones(2, 8), 1e-6)
    for bad in (torch.zeros(3, 17), torch.zeros(3, 16).double(), torch.zeros(16, 3).t(), torch.zeros(16)):
        with pytest.raises(ValueError, match=r"x: expected contiguous rows of torch.float32, shape \[T, 16\]"):
            norm(bad)
    with pytest.raises(ValueError, match=r"x: expected .* \[T, 16\]"):
        norm.norm_(torch.zeros(3, 15))
