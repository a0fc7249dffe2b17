from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker_svc.kernels.grouped_matmul import (
    Fp8Experts,
    block_rows,
    grouped_matmul,
    grouped_matmul_reference,
    sum_pairs,
    sum_pairs_reference,
)
from worker_svc.kernels.matmul_fp8 import quantize_fp8_reference
from worker_svc.kernels.moe_routing import Routing, align, align_reference, route_reference
from worker_svc.kernels.packed_weight import pack_weight
from worker_svc.kernels.tuning import Config
from worker_svc.quantization import Int4Weight, dequantize, quantize_fp8, quantize_int4, quantize_int8

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")

# Of the largest result. Scales of int4 have 20 bits; 16-bit types are rounded once.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


def owned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of a wider tensor that is otherwise not a number."""
    wide = torch.full((shape[0] + 2, shape[1] + 3), torch.nan, dtype=dtype)
    return wide[1:-1, 2:-1].copy_(torch.randn(shape))


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def routing_of(num_tokens: int, num_experts: int, top_k: int) -> Routing:
    return route_reference(torch.randn(num_tokens, num_experts), top_k)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 1), (3, 4, 2, 65, 40), (20, 3, 2, 33, 72)], ids=str)
def test_pairs_equal_their_reference(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    num_tokens, num_experts, top_k, size, in_features = shape
    routing = routing_of(num_tokens, num_experts, top_k)
    x, weight = owned(num_tokens, in_features, dtype=dtype), torch.randn(num_experts, size, in_features).to(dtype)
    y = grouped_matmul(x, weight, align_reference(routing.experts, num_experts, 16))
    assert_near(y, grouped_matmul_reference(x, weight, routing.experts))


def test_rows_of_pairs_are_weighted() -> None:
    routing = routing_of(5, 4, 2)
    x, weight = owned(10, 40), torch.randn(4, 33, 40)
    y = grouped_matmul(x, weight, align_reference(routing.experts, 4, 16), routing.weights)
    assert_near(y, grouped_matmul_reference(x, weight, routing.experts, routing.weights))


def int4_of_groups(weight: torch.Tensor) -> Int4Weight:
    values = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    shape = (len(weight), weight.shape[1] // 32)
    return Int4Weight(values, torch.rand(shape), torch.randint(0, 16, shape, dtype=torch.uint8))


@pytest.mark.parametrize("block_t", [16, 128])
@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, int4_of_groups])
def test_packed_experts_equal_their_reference(quantize: Callable[[torch.Tensor], Any], block_t: int) -> None:
    routing, x = routing_of(4, 3, 2), owned(4, 96)
    weight = quantize(torch.randn(3 * 64, 96))
    y = grouped_matmul(x, pack_weight(weight), align_reference(routing.experts, 3, block_t))
    assert_near(y, grouped_matmul_reference(x, dequantize(weight).view(3, 64, 96), routing.experts))


def test_float8_experts_equal_their_reference() -> None:
    routing = routing_of(4, 3, 2)
    weight = quantize_fp8(torch.randn(3 * 40, 144))
    experts = Fp8Experts(weight.values.view(3, 40, 144), weight.scales.view(3, 40))
    values, scales = quantize_fp8_reference(torch.randn(8, 144))
    alignment = align_reference(routing.experts, 3, 16)
    y = grouped_matmul(values, experts, alignment, routing.weights, scales, torch.float32)
    x, wide = values.float() * scales[:, None], dequantize(weight).view(3, 40, 144)
    assert_near(y, grouped_matmul_reference(x, wide, routing.experts, routing.weights))


def test_tiles_that_are_not_used_write_nothing() -> None:
    # All pairs go to one expert: 2 of 4 tiles are used, and the others' pairs are any integers.
    experts = torch.full((20, 1), 2, dtype=torch.int32)
    alignment = align(experts, 3, 16)
    x, weight = owned(20, 32), torch.randn(3, 16, 32)
    alignment.pairs[32:] = 0
    assert_near(grouped_matmul(x, weight, alignment), grouped_matmul_reference(x, weight, experts))


def test_not_a_number_stays_with_its_token() -> None:
    routing, x, weight = routing_of(5, 3, 2), owned(5, 32), torch.randn(3, 16, 32)
    alignment = align_reference(routing.experts, 3, 16)
    expected = grouped_matmul(x, weight, alignment)
    x[1, 3] = torch.nan
    y = grouped_matmul(x, weight, alignment)
    assert y[2:4].isnan().all()
    assert torch.equal(torch.cat([y[:2], y[4:]]), torch.cat([expected[:2], expected[4:]]))


def test_a_config_may_be_given() -> None:
    routing, x, weight = routing_of(5, 3, 2), owned(5, 100), torch.randn(3, 50, 100)
    config = Config({"BLOCK_T": 32, "BLOCK_N": 128, "BLOCK_K": 32})
    y = grouped_matmul(x, weight, align_reference(routing.experts, 3, 32), config=config)
    assert_near(y, grouped_matmul_reference(x, weight, routing.experts))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 33), (2, 3, 1025)], ids=str)
def test_sums_of_pairs_equal_their_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, top_k, size = shape
    y, residual = torch.randn(num_tokens * top_k, size).to(dtype), owned(num_tokens, size, dtype=dtype)
    assert_near(sum_pairs(y, top_k, residual), sum_pairs_reference(y, top_k, residual))
    assert_near(sum_pairs(y, top_k), sum_pairs_reference(y, top_k))


def test_no_tokens_give_no_rows() -> None:
    alignment = align(torch.ones(0, 2, dtype=torch.int32), 3, 16)
    assert grouped_matmul(torch.ones(0, 8), torch.ones(3, 5, 8), alignment).shape == (0, 5)
    assert sum_pairs(torch.ones(0, 5), 2).shape == (0, 5)


@pytest.mark.parametrize(("num_pairs", "expected"), [(2, 16), (128, 32), (8192, 128)])
def test_tiles_have_room_for_what_most_experts_get(num_pairs: int, expected: int) -> None:
    assert block_rows(num_pairs, 8) == expected


def test_wrong_inputs_are_named() -> None:
    alignment, weight = align_reference(torch.zeros(2, 2, dtype=torch.int32), 3, 16), torch.ones(3, 5, 8)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\), expected a row for each token or each of 4 pairs"):
        grouped_matmul(torch.ones(3, 8), weight, alignment)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 5, 8\), expected \(3, out, in\), contiguous"):
        grouped_matmul(torch.ones(2, 8), weight[:2], alignment)
    with pytest.raises(ValueError, match="weight is torch.float32, expected torch.float16"):
        grouped_matmul(torch.ones(2, 8).half(), weight, alignment)
    with pytest.raises(ValueError, match=r"pair_weights has shape \(3,\), expected 4 elements, contiguous"):
        grouped_matmul(torch.ones(2, 8), weight, alignment, torch.ones(3))
    with pytest.raises(ValueError, match="weight has 120 rows, expected multiples of 64 for each expert"):
        grouped_matmul(torch.ones(2, 32), pack_weight(quantize_int8(torch.ones(120, 32))), alignment)
    with pytest.raises(ValueError, match=r"y has shape \(3, 5\), expected \[T \* 2, out\], contiguous"):
        sum_pairs(torch.ones(3, 5), 2)
