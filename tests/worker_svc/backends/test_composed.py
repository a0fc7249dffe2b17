"""Linears made of linears compute what one of all their weights would."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from worker_svc.backends.composed import Reordering, SideBySide
from worker_svc.backends.torch_layers import PlainLinear


def test_outputs_stand_side_by_side() -> None:
    x, residual = torch.randn(3, 6), torch.randn(3, 9)
    weights, biases = [torch.randn(4, 6), torch.randn(5, 6)], [torch.randn(4), None]
    expected = torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], 1)
    linear = SideBySide([PlainLinear(weight, bias) for weight, bias in zip(weights, biases, strict=True)])
    torch.testing.assert_close(linear(x), expected)
    before = residual.clone()
    torch.testing.assert_close(linear.add(x, residual), before + expected)


def test_channels_are_taken_in_order() -> None:
    x, residual, weight, bias = torch.randn(3, 6), torch.randn(3, 4), torch.randn(4, 6), torch.randn(4)
    order = torch.randperm(6)
    linear = Reordering(PlainLinear(weight[:, order], bias), order)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x), expected)
    before = residual.clone()
    torch.testing.assert_close(linear.add(x, residual), before + expected)
