from typing import get_args

import pytest
import torch

from worker_svc.backends.backend import Activation
from worker_svc.kernels.swiglu import swiglu, swiglu_reference
from worker_svc.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("poison", "device_rounding")

ACTIVATIONS = get_args(Activation)
SMALL = Config({"BLOCK": 16}, num_warps=1)
# Exponentials differ in their last places, which may move a rounding by one place of the type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2 * 15), (2, 2 * 16), (5, 2 * 17), (2, 2 * 37)], ids=str)
def test_swiglu_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype, activation: Activation) -> None:
    gate_up = (3 * torch.randn(shape)).to(dtype)
    out, tolerance = swiglu(gate_up, activation, SMALL), TOLERANCE[dtype]
    torch.testing.assert_close(out, swiglu_reference(gate_up, activation), rtol=tolerance, atol=tolerance)


# The interpreter warns of exponentials that are infinite, as they are on a device.
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_saturate(activation: Activation) -> None:
    gate_up = torch.tensor([[1e30, -1e30, 50.0, -50.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[2e30, 0.0, 100.0, 0.0, 0.0]])
    torch.testing.assert_close(swiglu(gate_up, activation), expected)


def test_default_config_covers_columns_beyond_its_block() -> None:
    gate_up = torch.randn(1, 2 * 2049)
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up))


def test_strided_rows_are_read_where_they_are() -> None:
    wide = torch.full((3, 20), torch.nan)
    wide[:, 4:16].normal_()
    torch.testing.assert_close(swiglu(wide[:, 4:16]), swiglu_reference(wide[:, 4:16].contiguous()))


def test_no_tokens_give_no_rows() -> None:
    assert swiglu(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.ones(2, 5), r"gate_up has shape \(2, 5\), expected \[T, 2 \* I\]"),
        (torch.ones(8), r"gate_up has shape \(8,\), expected \[T, 2 \* I\]"),
        (torch.ones(4, 2).t(), "gate_up has stride 2"),
    ],
)
def test_wrong_tensor_is_named(gate_up: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate_up)
