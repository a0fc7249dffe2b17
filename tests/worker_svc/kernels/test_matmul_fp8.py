import pytest
import torch

from worker_svc.kernels.matmul_fp8 import (
    default_config,
    matmul_fp8,
    matmul_fp8_reference,
    prepare_fp8,
    quantize_fp8,
    quantize_fp8_reference,
)
from worker_svc.kernels.tuning import Config
from worker_svc.quantization import FP8, Fp8Weight
from worker_svc.quantization import quantize_fp8 as quantize_weight

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")

# Both are rounded once, but sums in another order may round to the neighbour.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


def owned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of a wider tensor that is otherwise not a number."""
    wide = torch.full((shape[0] + 2, shape[1] + 3), torch.nan, dtype=dtype)
    return wide[1:-1, 2:-1].copy_(torch.randn(shape))


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[y.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 513)], ids=str)
def test_quantized_rows_equal_their_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = owned(*shape, dtype=dtype)
    values, scales = quantize_fp8(x)
    expected_values, expected_scales = quantize_fp8_reference(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.float(), expected_values.float())


def test_quantized_values_are_near_what_was_there() -> None:
    x = torch.randn(4, 256) * torch.tensor([1e-3, 1.0, 1e3, 1e6])[:, None]
    values, scales = quantize_fp8(x)
    # 3 bits of a fraction, and the smallest steps below 2^-6 of what is stored.
    bound = 2**-4 * x.abs() + 2**-10 * scales[:, None]
    assert ((values.float() * scales[:, None] - x).abs() <= bound).all()


def test_a_row_of_zeros_stays_zero() -> None:
    values, scales = quantize_fp8(torch.zeros(2, 32))
    assert not values.float().any()
    assert (scales > 0).all()


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 65, 256), (17, 40, 144), (65, 130, 48)], ids=str)
def test_product_equals_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, size, in_features = shape
    x, weight = torch.randn(num_tokens, in_features).to(dtype), quantize_weight(torch.randn(size, in_features))
    bias, residual = torch.randn(size).to(dtype), owned(num_tokens, size, dtype=dtype)
    y = matmul_fp8(quantize_fp8(x), prepare_fp8(weight), dtype, bias, residual)
    assert_near(y, matmul_fp8_reference(x, weight, bias, residual))


def test_splits_add_up_to_the_same_each_time() -> None:
    x, weight = torch.randn(2, 1040), quantize_weight(torch.randn(70, 1040))
    prepared = prepare_fp8(weight)
    config = Config({"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLITS": 4})
    first, second = (matmul_fp8(quantize_fp8(x), prepared, torch.float32, config=config) for _ in range(2))
    assert torch.equal(first, second)
    assert not prepared.counters.any()
    assert_near(first, matmul_fp8_reference(x, weight))


def test_one_scale_serves_all_rows() -> None:
    weight = quantize_weight(torch.randn(5, 32))
    assert prepare_fp8(Fp8Weight(weight.values, torch.tensor(0.5))).scales.tolist() == [0.5] * 5


def test_no_tokens_give_no_rows() -> None:
    weight = prepare_fp8(quantize_weight(torch.randn(5, 32)))
    assert matmul_fp8(quantize_fp8(torch.ones(0, 32)), weight, torch.bfloat16).shape == (0, 5)


@pytest.mark.parametrize("num_tokens", [1, 17, 64, 65, 4096])
def test_default_stages_fit_into_shared_memory(num_tokens: int) -> None:
    config = default_config(num_tokens)
    blocks = config.blocks
    assert config.num_stages * (blocks["BLOCK_T"] + blocks["BLOCK_N"]) * blocks["BLOCK_K"] <= 200 * 1024


def test_rows_that_the_copy_engine_cannot_read_are_named() -> None:
    with pytest.raises(ValueError, match="the weight has 40 columns, expected a multiple of 16"):
        prepare_fp8(quantize_weight(torch.randn(5, 40)))


def test_wrong_inputs_are_named() -> None:
    weight = prepare_fp8(quantize_weight(torch.randn(5, 32)))
    with pytest.raises(ValueError, match=r"x has shape \(2, 16\), expected \(2, 32\)"):
        matmul_fp8(quantize_fp8(torch.ones(2, 16)), weight, torch.bfloat16)
    with pytest.raises(ValueError, match="x is torch.float32, expected torch.float8_e4m3fn"):
        matmul_fp8((torch.ones(2, 32), torch.ones(2)), weight, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x has stride 2 in its last dimension, expected 1"):
        matmul_fp8((torch.ones(32, 2).to(FP8).t(), torch.ones(2)), weight, torch.bfloat16)
    with pytest.raises(ValueError, match="x is torch.int32, expected bfloat16, float16 or float32"):
        quantize_fp8(torch.ones(2, 32, dtype=torch.int32))
