"""Weights in few bits stay near the floats they came from, and keep their rows."""

from __future__ import annotations

import pytest
import torch

from worker_svc.quantization import QUANTIZERS, dequantize, rows_of, side_by_side

# Half a step of the grid, relative to the largest value of a row or group; fp8 has 3 bits behind the leading one.
LARGEST_ERROR = {"int8": 0.5 / 127, "int4": 1.0 / 15, "fp8": 2**-4}


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("columns", [7, 128, 256])
def test_quantized_weight_is_near_the_weight(kind: str, columns: int) -> None:
    weight = torch.randn(5, columns) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    error = (dequantize(QUANTIZERS[kind](weight)) - weight).abs()
    # A group of int4 spans from its least to its largest value, at most twice the largest magnitude.
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert (error <= 1.01 * LARGEST_ERROR[kind] * largest + 1e-9).all()


@pytest.mark.parametrize("kind", [*QUANTIZERS, "float"])
def test_rows_are_chosen_and_joined_like_those_of_floats(kind: str) -> None:
    weights = [torch.randn(rows, 12) for rows in (4, 3)]
    quantized = [QUANTIZERS[kind](weight) if kind in QUANTIZERS else weight for weight in weights]
    order = torch.tensor([6, 0, 3, 5])
    chosen = rows_of(side_by_side(quantized), order)
    whole = torch.cat([weight if isinstance(weight, torch.Tensor) else dequantize(weight) for weight in quantized])
    values = chosen if isinstance(chosen, torch.Tensor) else dequantize(chosen)
    assert torch.equal(values, whole[order])
