"""Linears and norms against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker_svc.backends.torch_layers import (
    MIN_PADDED_BYTES,
    Int8Linear,
    PackedLinear,
    PlainLinear,
    RmsNorm,
    can_pack,
    make_linear,
)
from worker_svc.quantization import dequantize, quantize_int8


@pytest.mark.parametrize("kind", [PackedLinear, PlainLinear])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 17, 64])
def test_linear_is_a_product_and_a_sum(
    kind: type[PackedLinear] | type[PlainLinear], has_bias: bool, num_rows: int
) -> None:
    torch.manual_seed(0)
    weight, x, residual = torch.randn(24, 36), torch.randn(num_rows, 36), torch.randn(num_rows, 24)
    bias = torch.randn(24) if has_bias else None
    expected = x @ weight.T + (0 if bias is None else bias)
    before = residual.clone()
    linear = kind(weight, bias)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear.add(x, residual), expected + before)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_few_rows_on_a_large_weight_are_those_rows(num_rows: int) -> None:
    torch.manual_seed(num_rows)
    weight, x, residual = torch.randn(520, 516), torch.randn(num_rows, 516), torch.randn(num_rows, 520)
    assert weight.nbytes > MIN_PADDED_BYTES
    linear = PackedLinear(weight, None)
    expected = (x.double() @ weight.double().T).float()
    # Sums of 516 products of about one.
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.add(x, residual.clone()), expected + residual, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_int8_linear_is_off_by_the_rounding_of_its_inputs(has_bias: bool, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    weight = quantize_int8(torch.randn(40, 128))
    # Rows of very different sizes: each has its own scale.
    x = torch.randn(num_rows, 128) * torch.logspace(-4, 3, num_rows)[:, None]
    bias, residual = torch.randn(40) if has_bias else None, torch.randn(num_rows, 40)
    linear = make_linear(weight, bias)
    assert isinstance(linear, Int8Linear)
    products = x @ dequantize(weight).T
    expected = products + (0 if bias is None else bias)
    # Rounding to 127 steps (63 without VNNI) shifts each of 128 inputs by up to half a step, at random.
    error = (linear(x) - expected).norm(dim=1) / products.norm(dim=1)
    assert error.max() < 0.03
    torch.testing.assert_close(linear.add(x, residual.clone()), linear(x) + residual)


def test_rows_in_int8_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    linear = Int8Linear(quantize_int8(torch.randn(24, 64)), None)
    x = torch.randn(4, 64)
    spoiled = x.clone()
    spoiled[1], spoiled[2] = torch.nan, 1e6
    assert torch.equal(linear(spoiled)[[0, 3]], linear(x)[[0, 3]])
    assert linear(spoiled)[1].isnan().all()
    spoiled[1] = 0.0
    assert torch.equal(linear(spoiled)[1], torch.zeros(24))


def test_half_types_without_kernels_of_onednn_are_not_packed() -> None:
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float16))
    assert isinstance(make_linear(torch.zeros(2, 2, dtype=torch.float16)), PlainLinear)


# Beside the usual: rows of zeros, and values whose squares leave float32's normal range at both ends.
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-12, 1e15])
def test_norm_is_that_of_torch(scale: float) -> None:
    torch.manual_seed(0)
    x, weight = scale * torch.randn(5, 48), torch.randn(48)
    expected = F.rms_norm(x.double(), (48,), weight.double(), 1e-6).float()
    torch.testing.assert_close(RmsNorm(weight, 1e-6)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_in_place_broadcasts_over_heads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole, weight = torch.randn(3, 5, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    expected = F.rms_norm(whole[:, :4], (8,), None, 1e-5) * weight
    untouched = whole[:, 4].clone()
    RmsNorm(weight, 1e-5).norm_(whole[:, :4])
    torch.testing.assert_close(whole[:, :4], expected)
    assert torch.equal(whole[:, 4], untouched)
