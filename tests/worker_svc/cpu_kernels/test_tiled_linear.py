"""The packed linear against `F.linear` in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker_svc.cpu_kernels.launch import empty_rows
from worker_svc.cpu_kernels.register_tiles import MAX_TILE_ROWS, PANEL, TILE_ROWS
from worker_svc.cpu_kernels.tiled_linear import TiledLinear, can_tile

# Columns and channels: a part of a panel, whole panels, and both; the fewest channels there are.
SHAPES = [(1, 4), (PANEL - 1, 8), (PANEL, 52), (2 * PANEL, 64), (3 * PANEL + 5, 100)]
# Every tile, tiles and a rest, and none.
ROWS = sorted({0, 5, 7, 13, 25, 257, *TILE_ROWS, MAX_TILE_ROWS + 1, 2 * MAX_TILE_ROWS})


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_the_formula_with_and_without_bias_and_residual(
    num_rows: int, shape: tuple[int, int], num_threads: int
) -> None:
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x, residual = torch.randn(num_rows, shape[1]), torch.randn(num_rows, shape[0])
    before = residual.clone()
    plain, biased = TiledLinear(weight, None), TiledLinear(weight, bias)
    expected, shift = dense(x, weight), bias.double()
    for found, exact in (
        (plain(x), expected),
        (biased(x), expected + shift),
        (plain.add(x, residual), before + expected),
        (biased.add(x, before), before + expected + shift),
    ):
        # Float32 sums of up to 100 products of about one.
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 2, 13, 257])
def test_rows_may_be_apart(num_rows: int, num_threads: int) -> None:
    weight, x = torch.randn(40, 1024), empty_rows(num_rows, 1024)
    x.copy_(torch.randn(num_rows, 1024))
    assert x.stride(0) == 1040
    # Float32 sums of 1,024 products of about one.
    torch.testing.assert_close(TiledLinear(weight, None)(x).double(), dense(x, weight), rtol=1e-5, atol=1e-4)


def test_one_thread_and_two_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = TiledLinear(torch.randn(5 * PANEL + 3, 64), torch.randn(5 * PANEL + 3)), torch.randn(29, 64)
    found = []
    for count in (1, 2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        found.append(linear(x))
    assert all(other.equal(found[0]) for other in found)


def test_work_so_long_that_python_goes_on_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = TiledLinear(torch.randn(70, 64), None), torch.randn(13, 64)
    short = linear(x)
    monkeypatch.setattr("worker_svc.cpu_kernels.tiled_linear._LONG", 0)
    assert linear(x).equal(short)


@pytest.mark.parametrize("num_rows", [3, 13, 30])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_shows(num_rows: int, value: float) -> None:
    x, linear = torch.randn(num_rows, 64), TiledLinear(torch.randn(50, 64), torch.randn(50))
    clean = linear(x)
    x[2, 17] = value
    found = linear(x)
    assert not found[2].isfinite().any()
    others = [row for row in range(num_rows) if row != 2]
    assert found[others].equal(clean[others])


def test_residual_that_is_not_finite_stays_in_its_value() -> None:
    residual, linear = torch.randn(13, 50), TiledLinear(torch.randn(50, 64), None)
    residual[4, 49] = torch.nan
    found = linear.add(torch.randn(13, 64), residual)
    assert found.isnan().nonzero().tolist() == [[4, 49]]


def test_weight_of_any_layout_is_packed() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64, 50)
    torch.testing.assert_close(TiledLinear(weight.t(), None)(x).double(), dense(x, weight.t()), rtol=1e-5, atol=1e-5)
    apart = torch.randn(45, 80)[:, 8:72]
    assert not apart.is_contiguous()
    torch.testing.assert_close(TiledLinear(apart, None)(x).double(), dense(x, apart), rtol=1e-5, atol=1e-5)


def test_packed_weight_is_a_copy() -> None:
    x, weight = torch.randn(5, 8), torch.randn(PANEL, 8)
    linear = TiledLinear(weight, None)
    before = linear(x)
    weight.zero_()
    assert linear(x).equal(before)


@pytest.mark.parametrize("weight", [torch.zeros(8, 6), torch.zeros(8, 8).bfloat16(), torch.zeros(8, 8, device="meta")])
def test_weights_that_cannot_be_packed_are_refused(weight: torch.Tensor) -> None:
    assert not can_tile(weight)
    with pytest.raises(ValueError, match=r"weight: .*expected torch.float32 of shape \[out, 4 \* any\] on cpu"):
        TiledLinear(weight, None)


def test_other_shapes_types_and_layouts_are_refused() -> None:
    linear = TiledLinear(torch.zeros(5, 8), None)
    with pytest.raises(ValueError, match=r"bias: shape \[8\], expected \[5\]"):
        TiledLinear(torch.zeros(5, 8), torch.zeros(8))
    for bad in (torch.zeros(3, 4), torch.zeros(3, 8).double(), torch.zeros(8, 3).t(), torch.zeros(8)):
        with pytest.raises(ValueError, match=r"x: expected contiguous rows of torch.float32, shape \[T, 8\]"):
            linear(bad)
    for bad in (torch.zeros(2, 5), torch.zeros(3, 5).double(), torch.zeros(5, 3).t()):
        with pytest.raises(ValueError, match=r"residual: expected contiguous torch.float32 of shape \[3, 5\]"):
            linear.add(torch.zeros(3, 8), bad)
