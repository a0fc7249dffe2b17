import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from worker_svc.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("poison", "device_rounding")

SHAPES = [(1, 1), (1, 64), (3, 127), (2, 129), (5, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the last place kept: sums of squares are added in another order, which may move a rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    # A rounding that is moved is rare; one too many or too few is not.
    assert out.dtype == torch.float32 or int((out != expected).sum()) <= out.numel() // 50


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    assert_near(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_norms_the_rounded_sum_and_gives_it_too(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    expected_normed, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert_near(normed, expected_normed)
    assert torch.equal(total, expected_total)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_references_are_the_norms_of_transformers(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 48, dtype=dtype), torch.randn(48, dtype=dtype)
    llama, gemma = LlamaRMSNorm(48, 1e-5).to(dtype), Gemma3RMSNorm(48, 1e-5).to(dtype)
    for norm in (llama, gemma):
        norm.weight.data.copy_(weight)
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), llama(x))
    assert torch.equal(rms_norm_reference(x, 1 + weight.float(), 1e-5), gemma(x))


def test_float32_weight_is_not_rounded_to_the_type_of_x() -> None:
    x, weight = torch.randn(3, 50, dtype=torch.bfloat16), 1 + torch.randn(50) * 1e-2
    assert_near(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


def test_strided_rows_are_read_where_they_are() -> None:
    wide, weight = torch.full((4, 3, 30), torch.nan), torch.randn(30)
    x, residual = wide[:, 0], wide[:, 2]
    x.normal_()
    residual.normal_()
    assert_near(rms_norm(x, weight, 1e-5), F.rms_norm(x, (30,), weight, 1e-5))
    assert_near(add_rms_norm(x, residual, weight, 1e-5)[0], F.rms_norm(x + residual, (30,), weight, 1e-5))


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    out = rms_norm(x, torch.ones(8), 1e-5)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_no_tokens_give_no_rows() -> None:
    normed, total = add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), 1e-5)
    assert normed.shape == total.shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(4), r"x has shape \(2, 3, 4\), expected \[T, E\]"),
        (torch.ones(2, 4), torch.ones(2, 5), torch.ones(4), r"residual has shape \(2, 5\), expected \(2, 4\)"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(5), r"weight has shape \(5,\), expected \(4,\)"),
        (torch.ones(2, 4), torch.ones(2, 4).half(), torch.ones(4), "residual is torch.float16, expected torch.float32"),
        (torch.ones(2, 4), torch.ones(2, 4), torch.ones(4).half(), "weight is torch.float16, expected torch.float32"),
        (torch.ones(4, 2).t(), torch.ones(2, 4), torch.ones(4), "x has stride 2"),
    ],
)
def test_wrong_tensor_is_named(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_rms_norm(x, residual, weight, 1e-5)
