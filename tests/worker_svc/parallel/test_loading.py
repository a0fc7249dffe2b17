"""Quantized weights that ranks share are those of the whole, and what cannot be cut is refused."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import ThreadGroup, run_ranks
from weft.errors import SettingsError
from worker_svc.backends.torch_layers import PlainLinear
from worker_svc.models.loader import Loader, Part
from worker_svc.parallel.group import Group
from worker_svc.quantization import QUANTIZERS, Reordered, StoredWeight, Weight, in_float, quantize

ROWS, COLUMNS = 12, 512


class Weights:
    """A source of one weight."""

    def __init__(self, weight: StoredWeight) -> None:
        self._weight = weight

    def weight(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        assert in_float(self._weight).shape == shape
        return self._weight


class FloatBackend:
    """Computes in float32 whatever the weight is."""

    device = torch.device("cpu")
    dtype = torch.float32

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> PlainLinear:
        return PlainLinear(in_float(weight), bias)


def make_loader(weight: StoredWeight, kind: str, group: Group) -> Loader:
    return Loader(Weights(weight), FloatBackend(), kind, group)


def of_both(weight: StoredWeight, kind: str, x: torch.Tensor) -> torch.Tensor:
    """What two ranks, each with half the columns, compute for x."""

    def body(group: ThreadGroup) -> torch.Tensor:
        size = x.shape[1] // 2
        linear = make_loader(weight, kind, group).output(Part("down", ROWS), size)
        return linear(x[:, size * group.rank : size * (group.rank + 1)])

    return run_ranks(2, body)[0]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_columns_are_quantized_as_those_of_one_rank(kind: str) -> None:
    weight, x = torch.randn(ROWS, COLUMNS), torch.randn(3, COLUMNS)
    # Float32 sums of 512 products in another order.
    torch.testing.assert_close(of_both(weight, kind, x), x @ in_float(quantize(weight, kind)).T, rtol=1e-4, atol=1e-4)


def test_columns_of_scattered_groups_are_shared() -> None:
    weight = Reordered(quantize(torch.randn(ROWS, COLUMNS), "int4"), torch.randperm(COLUMNS))
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(of_both(weight, "none", x), x @ in_float(weight).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", *QUANTIZERS])
def test_rows_are_quantized_as_those_of_one_rank(kind: str) -> None:
    weight, x = torch.randn(ROWS, COLUMNS), torch.randn(3, COLUMNS)
    part = Part("q", ROWS // 2, head_dim=6, rotary_dim=4, is_shared=True)
    ranks = [make_loader(weight, kind, Group(rank, 2)).linear([part], COLUMNS)(x) for rank in range(2)]
    whole = make_loader(weight, kind, Group()).linear([Part("q", ROWS, head_dim=6, rotary_dim=4)], COLUMNS)(x)
    torch.testing.assert_close(torch.cat(ranks, dim=1), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("is_stored", [True, False])
def test_groups_that_would_be_cut_are_refused(is_stored: bool) -> None:
    weight = torch.randn(ROWS, 384)
    loader = make_loader(
        quantize(weight, "int4") if is_stored else weight, "none" if is_stored else "int4", Group(1, 2)
    )
    with pytest.raises(SettingsError, match="tensor_parallel: down .* 2 ranks: .* groups of 128"):
        loader.output(Part("down", ROWS), 192)
