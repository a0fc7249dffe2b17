from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker_svc.kernels.matmul_weight_only import default_config, matmul_weight_only, matmul_weight_only_reference
from worker_svc.kernels.packed_weight import pack_weight
from worker_svc.kernels.tuning import Config
from worker_svc.quantization import Int4Weight, quantize_int4, quantize_int8

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")

# Of the largest result. Scales have 20 bits; with many tokens, weights in 16 bits are rounded once more.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CPU = torch.device("cpu")
Quantize = Callable[[torch.Tensor], Any]


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


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 65, 256), torch.bfloat16),
        ((1, 64, 129), torch.float16),
        ((17, 64, 100), torch.bfloat16),
        ((2, 64, 100), torch.float32),
        ((65, 130, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_product_equals_its_reference(shape: tuple[int, int, int], quantize: Quantize, dtype: torch.dtype) -> None:
    num_tokens, size, in_features = shape
    weight, x = quantize(torch.randn(size, in_features)), owned(num_tokens, in_features, dtype=dtype)
    bias, residual = torch.randn(size).to(dtype), owned(num_tokens, size, dtype=dtype)
    y = matmul_weight_only(x, pack_weight(weight), bias, residual)
    assert_near(y, matmul_weight_only_reference(x, weight, bias, residual))


@pytest.mark.parametrize("num_tokens", [1, 65])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_have_their_own_scales_and_zeros(group_size: int, num_tokens: int) -> None:
    shape = (64, 256 // group_size)
    values = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    weight = Int4Weight(values, torch.rand(shape), torch.randint(0, 16, shape, dtype=torch.uint8))
    x = owned(num_tokens, 256, dtype=torch.bfloat16)
    assert_near(matmul_weight_only(x, pack_weight(weight)), matmul_weight_only_reference(x, weight))


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_splits_add_up_to_the_same_each_time(quantize: Quantize) -> None:
    weight, x = quantize(torch.randn(64, 512)), owned(2, 512)
    packed, config = pack_weight(weight), Config({"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLITS": 2})
    first, second = (matmul_weight_only(x, packed, config=config) for _ in range(2))
    assert torch.equal(first, second)
    assert not packed.counters.any()
    assert_near(first, matmul_weight_only_reference(x, weight))


def test_tiles_of_128_rows_end_with_the_weight() -> None:
    weight, x = quantize_int4(torch.randn(190, 128)), owned(3, 128)
    config = Config({"BLOCK_T": 16, "BLOCK_N": 128, "BLOCK_K": 128})
    assert_near(matmul_weight_only(x, pack_weight(weight), config=config), matmul_weight_only_reference(x, weight))


def test_not_a_number_stays_in_its_row() -> None:
    packed, x = pack_weight(quantize_int4(torch.randn(64, 128))), owned(3, 128)
    expected = matmul_weight_only(x, packed)
    x[1, 5] = torch.nan
    y = matmul_weight_only(x, packed)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected[::2])


def test_no_tokens_give_no_rows() -> None:
    assert matmul_weight_only(torch.ones(0, 32), pack_weight(quantize_int8(torch.ones(5, 32)))).shape == (0, 5)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 17, 64, 65, 4096])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_default_steps_do_not_cross_groups(dtype: torch.dtype, num_tokens: int, group_size: int) -> None:
    shape = (64, 256 // group_size)
    values, zeros = torch.zeros(64, 256, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
    packed = pack_weight(Int4Weight(values, torch.ones(shape), zeros))
    assert group_size % default_config(num_tokens, packed, dtype, 132).blocks["BLOCK_K"] == 0


def test_wrong_inputs_are_named() -> None:
    packed = pack_weight(quantize_int8(torch.randn(5, 32)))
    with pytest.raises(ValueError, match=r"x has shape \(2, 31\), expected \(2, 32\)"):
        matmul_weight_only(torch.ones(2, 31), packed)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), expected \(5,\)"):
        matmul_weight_only(torch.ones(2, 32), packed, bias=torch.ones(4))
    with pytest.raises(ValueError, match=r"out is torch.float16, expected torch.float32"):
        matmul_weight_only(torch.ones(2, 32), packed, out=torch.ones(2, 5).half())
