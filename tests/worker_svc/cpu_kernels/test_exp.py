"""e^x against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worker_svc.cpu_kernels.exp import exp
from worker_svc.cpu_kernels.launch import arguments, floats, kernel, launch

pytestmark = pytest.mark.usefixtures("without_cache")
NAN, INF = math.nan, math.inf


@kernel
def _exp(pointer):  # type: ignore[no-untyped-def]
    """A loop that becomes vector instructions, as in the kernels that use it."""
    args = arguments(pointer)
    x, out = floats(args[1], args[0]), floats(args[2], args[0])
    for i in range(args[0]):
        out[i] = exp(x[i])


def exps(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x))
    launch(_exp, 1, len(x), x.data_ptr(), out.data_ptr())
    return out


def errors(x: torch.Tensor) -> np.ndarray:
    """In units in the last place of the result."""
    exact = x.double().exp().numpy()
    return np.abs(exps(x).double().numpy() - exact) / np.spacing(exact.astype(np.float32))


def test_error_is_two_units_in_the_last_place_over_the_whole_range() -> None:
    assert errors(torch.linspace(-87.3, 88.3, 2_000_003)).max() <= 2
    assert errors(torch.empty(1_000_003).uniform_(-87.3, 88.3)).max() <= 2


def test_error_is_small_next_to_zero_and_where_the_exponent_changes() -> None:
    halves = (torch.arange(-251, 253) * (math.log(2) / 2)).float()
    near = torch.cat([halves, torch.nextafter(halves, torch.tensor(INF)), torch.nextafter(halves, torch.tensor(-INF))])
    tiny = torch.logspace(-45, 0, 1001)
    assert errors(torch.cat([near, tiny, -tiny]).clamp(-87.3, 88.3)).max() <= 2


def test_beyond_the_range_are_zero_and_infinity_and_nan_stays() -> None:
    x = torch.tensor([0.0, -0.0, 88.5, 1e9, 3e38, INF, -88.0, -1e9, -3e38, -INF, NAN])
    expected = torch.tensor([1.0, 1.0, INF, INF, INF, INF, 0.0, 0.0, 0.0, 0.0, NAN])
    assert exps(x).allclose(expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_jumps_at_the_ends_of_the_range() -> None:
    assert (exps(torch.linspace(-89, -87.3, 10_001)).diff() >= 0).all()
    above = exps(torch.linspace(88.3, 89, 10_001))
    assert not above.isnan().any() and (above > 2e38).all()


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 67])
def test_any_number_of_values_is_computed(size: int) -> None:
    x = torch.randn(size)
    torch.testing.assert_close(exps(x), x.exp())
