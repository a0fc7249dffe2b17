"""The int8 linear for AVX-512 VNNI against integer products in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from worker_svc.backends.numba_backend import NumbaBackend
from worker_svc.backends.torch_layers import Int8Linear, can_multiply_int8
from worker_svc.cpu_kernels import launch
from worker_svc.cpu_kernels.int8_linear import GROUP, HAS_VNNI, UNROLL, TiledInt8Linear
from worker_svc.cpu_kernels.register_tiles import MAX_TILE_ROWS, PANEL
from worker_svc.quantization import Int8Weight, quantize, quantize_int8

pytestmark = pytest.mark.skipif(not (HAS_VNNI and launch.IS_AVAILABLE), reason="no AVX-512 VNNI, or no OpenMP")

ROWS = (0, 1, 2, 3, 5, MAX_TILE_ROWS, MAX_TILE_ROWS + 1, 33)
PASS = GROUP * UNROLL
# Columns and channels: whole panels and passes of the inner loop, less, more, and odd numbers of both.
SHAPES = ((PANEL, PASS), (2 * PANEL, 4 * PASS), (1, 1), (PANEL - 1, PASS + 1), (PANEL + 13, 5 * PASS - 3), (7, 512))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_weight(num_columns: int, size: int) -> Int8Weight:
    values = torch.randint(-128, 128, (num_columns, size), dtype=torch.int8)
    return Int8Weight(values, torch.rand(num_columns, 1) / size)


def reference(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, out] float64 for finite rows that are not zero."""
    largest = x.abs().amax(1, keepdim=True)
    # In one rounding, as the kernel has it with a fused addition: a value may be just between two integers.
    # A number divided by a tensor would be multiplied by its inverse, which is another rounding.
    steps = (x.double() * (torch.tensor(127.0) / largest).double()).round()
    products = (steps @ weight.values.double().T) * largest.double() / 127 * weight.scales.double().T
    return products + (0 if bias is None else bias.double())


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    # Sums of integers are exact. They are rounded to float32 five times, and what is added may cancel most of it.
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(result, expected.float(), rtol=1e-6, atol=1e-6 * max(1.0, largest))


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", ROWS)
def test_products_are_those_of_quantized_rows(num_rows: int, shape: tuple[int, int], has_bias: bool) -> None:
    num_columns, size = shape
    weight, x, residual = random_weight(*shape), torch.randn(num_rows, size), torch.randn(num_rows, num_columns)
    bias = torch.randn(num_columns) if has_bias else None
    before = x.clone(), residual.clone()
    linear, expected = TiledInt8Linear(weight, bias), reference(x, weight, bias)
    assert_close(linear(x), expected)
    assert_close(linear.add(x, residual), expected + residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("num_rows", [1, 70])
def test_threads_share_rows_and_columns(num_rows: int) -> None:
    # So many values that two threads quantize them.
    weight, x = random_weight(5 * PANEL + 3, 512), torch.randn(num_rows, 512)
    assert_close(TiledInt8Linear(weight, None)(x), reference(x, weight, None))


def test_rows_may_stand_apart() -> None:
    weight, wide = random_weight(40, 48), torch.randn(13, 80)
    x = wide[:, 9:57]
    assert torch.equal(TiledInt8Linear(weight, None)(x), TiledInt8Linear(weight, None)(x.contiguous()))


def test_the_largest_values_do_not_overflow() -> None:
    size = 2**17 - PASS
    weight, x = Int8Weight(torch.full((2, size), -128, dtype=torch.int8), torch.ones(2, 1)), torch.full((1, size), 2.0)
    x[0, 0] = -2.0
    assert_close(TiledInt8Linear(weight, None)(x), reference(x, weight, None))


@pytest.mark.parametrize("scale", [1e-29, 1e-3, 1e30])
def test_every_row_has_its_own_scale(scale: float) -> None:
    weight, x = random_weight(40, 64), torch.randn(5, 64)
    linear, scales = TiledInt8Linear(weight, None), torch.tensor([1.0, scale, 1.0, scale, 1.0])[:, None]
    scaled = linear(x * scales) / scales
    # A value between two integers may go to the other one: a step of 127 times the largest weight.
    torch.testing.assert_close(scaled, reference(x * scales, weight, None).float() / scales, rtol=1e-5, atol=1e-5)
    assert torch.equal(scaled[::2], linear(x)[::2])


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, 1e-38])
def test_a_row_of_zeros_or_next_to_nothing_gives_bias_and_residual(tiny: float) -> None:
    weight, bias, x, residual = random_weight(40, 64), torch.randn(40), torch.randn(3, 64), torch.randn(3, 40)
    x[1] = tiny
    linear = TiledInt8Linear(weight, bias)
    assert torch.equal(linear(x)[1], bias)
    assert torch.equal(linear.add(x, residual)[1], bias + residual[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_rows", [1, 3, MAX_TILE_ROWS + 1])
def test_a_row_that_is_not_finite_gives_none_that_is_and_leaves_others_alone(num_rows: int, bad: float) -> None:
    linear, x = TiledInt8Linear(random_weight(45, 61), torch.randn(45)), torch.randn(num_rows, 61)
    expected, spoiled = linear(x), int(torch.randint(num_rows, ()))
    x[spoiled, torch.randint(61, ())] = bad
    result, others = linear(x), torch.arange(num_rows) != spoiled
    assert not result[spoiled].isfinite().any()
    assert torch.equal(result[others], expected[others])


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    linear, x = TiledInt8Linear(random_weight(70, 80), torch.randn(70)), torch.randn(33, 80)
    whole = linear(x)
    for num_rows in ROWS:
        assert torch.equal(linear(x[:num_rows]), whole[:num_rows])


def test_recorded_launches_compute_what_x_and_residual_are_then() -> None:
    linear, x, residual = (
        TiledInt8Linear(random_weight(45, 61), torch.randn(45)),
        torch.zeros(9, 61),
        torch.zeros(9, 45),
    )
    launches, out = launch.record(lambda: linear.add(x, residual))
    x.normal_()
    residual.normal_()
    launches.run(torch.get_num_threads(), 5)
    assert torch.equal(out[:5], linear.add(x[:5], residual[:5]))


@pytest.mark.skipif(not can_multiply_int8(torch.device("cpu")), reason="no fbgemm")
def test_it_is_nearly_fbgemms() -> None:
    weight, bias, x = quantize_int8(torch.randn(70, 256)), torch.randn(70), torch.randn(17, 256)
    ours, theirs = TiledInt8Linear(weight, bias)(x), Int8Linear(weight, bias)(x)
    # A value just between two integers may go to either: a step of x times a weight, 1 / 127 of both largest.
    step = x.abs().amax() / 127 * weight.scales.amax() * 127
    assert (ours - theirs).abs().max() < 4 * step


def test_the_backend_takes_it_for_quantized_weights() -> None:
    backend = NumbaBackend(torch.device("cpu"), torch.float32)
    assert isinstance(backend.linear(quantize(torch.randn(40, 128), "int4"), None), TiledInt8Linear)


@pytest.mark.parametrize("shape", [(3, 63), (3, 65), (64,)], ids=str)
def test_rows_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x: expected .*64"):
        TiledInt8Linear(random_weight(40, 64), None)(torch.randn(shape))


def test_a_residual_scales_or_a_bias_of_another_shape_is_refused() -> None:
    weight, x = random_weight(40, 64), torch.randn(3, 64)
    with pytest.raises(ValueError, match="residual"):
        TiledInt8Linear(weight, None).add(x, torch.randn(3, 41))
    with pytest.raises(ValueError, match="bias"):
        TiledInt8Linear(weight, torch.randn(39))
    with pytest.raises(ValueError, match="scales"):
        TiledInt8Linear(Int8Weight(weight.values, torch.ones(40, 2)), None)
