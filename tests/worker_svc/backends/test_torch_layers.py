"""Linears and norms against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker_svc.backends.torch_layers import PackedLinear, PlainLinear, RmsNorm, can_pack, make_linear


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
