"""Weights in few bits stay near the floats they came from, and keep their rows and columns."""

from __future__ import annotations

import pytest
import torch

from worker_svc import quantization
from worker_svc.quantization import (
    QUANTIZERS,
    Reordered,
    StoredWeight,
    as_int8,
    can_join,
    columns_of,
    dequantize,
    in_float,
    quantize,
    rows_of,
    side_by_side,
)

# Half a step of the grid, relative to the largest value of a row or group; fp8 has 3 bits behind the leading one.
LARGEST_ERROR = {"int8": 0.5 / 127, "int4": 1.0 / 15, "fp8": 2**-4}
KINDS = ["float", *QUANTIZERS, "reordered"]


def stored(kind: str, rows: int, columns: int = 256, order: torch.Tensor | None = None) -> StoredWeight:
    weight = torch.randn(rows, columns)
    if kind == "reordered":
        return Reordered(quantize(weight, "int4"), torch.arange(columns).flip(0) if order is None else order)
    return weight if kind == "float" else quantize(weight, kind)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("columns", [7, 128, 256])
def test_quantized_weight_is_near_the_weight(kind: str, columns: int) -> None:
    weight = torch.randn(5, columns) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    error = (dequantize(QUANTIZERS[kind](weight)) - weight).abs()
    # A group of int4 spans from its least to its largest value, at most twice the largest magnitude.
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert (error <= 1.01 * LARGEST_ERROR[kind] * largest + 1e-9).all()


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_rows_at_a_time_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 128)
    whole, int8 = quantize(weight, kind), as_int8(QUANTIZERS[kind](weight))
    monkeypatch.setattr(quantization, "CHUNK_ELEMENTS", 3 * 128)
    assert torch.equal(dequantize(quantize(weight, kind)), dequantize(whole))
    assert torch.equal(dequantize(as_int8(whole)), dequantize(int8))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_kind_becomes_int8_of_one_scale_a_row(kind: str) -> None:
    weight = quantize(torch.randn(5, 256), kind)
    converted, meant = as_int8(weight), dequantize(weight)
    assert isinstance(converted, quantization.Int8Weight)
    assert converted.scales.shape == (5, 1)
    # Half a step of the row's grid.
    step = meant.abs().amax(dim=1, keepdim=True) / 127
    assert ((dequantize(converted) - meant).abs() <= 0.501 * step).all()
    assert kind != "int8" or converted is weight


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_chosen_and_joined_like_those_of_floats(kind: str) -> None:
    weights = [stored(kind, 4), stored(kind, 3)]
    assert can_join(weights)
    order = torch.tensor([6, 0, 3, 5])
    chosen = rows_of(side_by_side(weights), order)
    assert torch.equal(in_float(chosen), torch.cat([in_float(weight) for weight in weights])[order])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_different_kinds_and_orders_cannot_be_joined(kind: str) -> None:
    others = [stored(other, 3) for other in KINDS if other != kind]
    assert not any(can_join([stored(kind, 3), other]) for other in others)
    assert not can_join([stored("reordered", 3), stored("reordered", 3, order=torch.randperm(256))])
    assert not can_join([stored("int4", 3), stored("int4", 3, columns=250)])


@pytest.mark.parametrize("kind", ["float", *QUANTIZERS])
def test_columns_are_chosen_like_those_of_floats(kind: str) -> None:
    weight = stored(kind, 5, columns=384)
    assert not isinstance(weight, Reordered)
    assert torch.equal(in_float(columns_of(weight, 128, 384)), in_float(weight)[:, 128:])


def test_columns_that_cut_a_group_are_refused() -> None:
    weight = quantize(torch.randn(5, 384), "int4")
    with pytest.raises(ValueError, match="columns 64 to 256 cut groups of 128 columns"):
        columns_of(weight, 64, 256)
