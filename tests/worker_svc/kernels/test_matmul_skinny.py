import pytest
import torch

from worker_svc.kernels.matmul_skinny import default_config, matmul_skinny, matmul_skinny_reference, tuning_key
from worker_svc.kernels.matmul_tile import make_counters
from worker_svc.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")

# Both are rounded once, but sums in another order may round to the neighbour.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SPLIT = Config({"BLOCK_T": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SPLITS": 4})
CPU = torch.device("cpu")


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
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 130, 257), (4, 37, 31), (5, 65, 128), (33, 64, 129)], ids=str)
def test_product_equals_its_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, size, in_features = shape
    x, weight = owned(num_tokens, in_features, dtype=dtype), owned(size, in_features, dtype=dtype)
    bias, residual = torch.randn(size).to(dtype), owned(num_tokens, size, dtype=dtype)
    y = matmul_skinny(x, weight, make_counters(size, CPU), bias, residual)
    assert_near(y, matmul_skinny_reference(x, weight, bias, residual))


@pytest.mark.parametrize("in_features", [128, 250])
def test_splits_add_up(in_features: int) -> None:
    x, weight, counters = owned(3, in_features), owned(40, in_features), make_counters(40, CPU)
    bias, residual = torch.randn(40), owned(3, 40)
    y = matmul_skinny(x, weight, counters, bias, residual, config=SPLIT)
    assert_near(y, matmul_skinny_reference(x, weight, bias, residual))


def test_counters_are_left_for_the_next_launch() -> None:
    x, weight, counters = owned(2, 256), owned(40, 256), make_counters(40, CPU)
    first, second = (matmul_skinny(x, weight, counters, config=SPLIT) for _ in range(2))
    assert not counters.any()
    assert torch.equal(first, second)


def test_result_may_take_the_place_of_the_residual() -> None:
    x, weight, residual = owned(2, 64), owned(40, 64), owned(2, 40)
    expected = matmul_skinny_reference(x, weight, residual=residual)
    assert matmul_skinny(x, weight, make_counters(40, CPU), residual=residual, out=residual) is residual
    assert_near(residual, expected)


def test_not_a_number_stays_in_its_row() -> None:
    x, weight, counters = owned(3, 96), owned(40, 96), make_counters(40, CPU)
    expected = matmul_skinny(x, weight, counters, config=SPLIT)
    x[1, 5] = torch.nan
    y = matmul_skinny(x, weight, counters, config=SPLIT)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected[::2])


def test_no_tokens_give_no_rows() -> None:
    assert matmul_skinny(torch.ones(0, 8), torch.ones(5, 8), make_counters(5, CPU)).shape == (0, 5)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 64])
@pytest.mark.parametrize("size", [4096, 6144, 28672, 128256])
def test_default_stages_fit_three_times_on_a_multiprocessor(size: int, num_tokens: int) -> None:
    weight = torch.empty((size, 4096), dtype=torch.bfloat16, device="meta")
    config = default_config(num_tokens, weight, 132)
    block_t, block_n, block_k = (config.blocks[name] for name in ("BLOCK_T", "BLOCK_N", "BLOCK_K"))
    assert 2 <= config.num_stages <= 227 * 1024 // 3 // ((block_t + block_n) * block_k * 2)


def test_key_tells_few_tokens_apart() -> None:
    weight = torch.empty((8, 4), dtype=torch.bfloat16)
    assert tuning_key(3, weight) == "8x4, T <= 4, torch.bfloat16"
    assert tuning_key(17, weight) == "8x4, T <= 32, torch.bfloat16"


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 7), torch.ones(5, 8), r"x has shape \(2, 7\), expected \(2, 8\)"),
        (torch.ones(8), torch.ones(5, 8), r"x has shape \(8,\), expected \[T, 8\]"),
        (torch.ones(65, 8), torch.ones(5, 8), r"x has shape \(65, 8\), expected at most 64 tokens"),
        (torch.ones(8, 2).t(), torch.ones(5, 8), r"x has stride 2 in its last dimension, expected 1"),
        (torch.ones(2, 8), torch.ones(8, 5).t(), r"weight has stride 5 in its last dimension, expected 1"),
        (torch.ones(2, 8), torch.ones(5, 8).half(), r"weight is torch.float16, expected torch.float32"),
        (torch.ones(2, 8).int(), torch.ones(5, 8).int(), r"x is torch.int32, expected bfloat16, float16 or float32"),
    ],
)
def test_wrong_inputs_are_named(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul_skinny(x, weight, make_counters(5, CPU))


def test_wrong_output_is_named() -> None:
    with pytest.raises(ValueError, match=r"out has shape \(2, 4\), expected \(2, 5\)"):
        matmul_skinny(torch.ones(2, 8), torch.ones(5, 8), make_counters(5, CPU), out=torch.ones(2, 4))
