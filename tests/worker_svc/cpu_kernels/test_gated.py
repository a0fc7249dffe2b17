"""Gated values against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from worker_svc.backends import torch_experts
from worker_svc.backends.backend import Activation
from worker_svc.cpu_kernels.gated import gated

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


def dense(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul(up).float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 13, 257])
@pytest.mark.parametrize("size", [1, 15, 50, 1024])
def test_rows_are_the_formula(activation: Activation, num_rows: int, size: int, num_threads: int) -> None:
    gate_up = 3 * torch.randn(num_rows, 2 * size)
    found = gated(gate_up, activation)
    assert found.stride(0) == (1040 if size == 1024 else size) or num_rows == 0
    # Units in the last place; where GELU vanishes, those of one times gate and up, which reach 200.
    torch.testing.assert_close(found, dense(gate_up, activation), rtol=3e-6, atol=2e-5)
    torch.testing.assert_close(found, torch_experts.gated(gate_up, activation), rtol=3e-6, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_are_open_or_closed(activation: Activation) -> None:
    sizes = torch.tensor([20.0, 60.0, 87.0, 88.0, 89.0, 1e3, 1e10, 1e20, 3e38])
    gate = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, 1e-30, 1e-45])])
    found = gated(torch.cat([gate, torch.ones_like(gate)])[None], activation)[0]
    # Float32 next to zero: e^-20 times 20 is 4e-8.
    torch.testing.assert_close(found, gate.clamp_min(0.0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("half", [0, 1], ids=["gate", "up"])
def test_what_is_not_finite_stays_in_its_value_and_shows(activation: Activation, value: float, half: int) -> None:
    gate_up = torch.randn(4, 2 * 37)
    clean = gated(gate_up, activation)
    gate_up[2, 37 * half + 20] = value
    found = gated(gate_up, activation)
    assert not found[2, 20].isfinite()
    found[2, 20] = clean[2, 20]
    assert found.equal(clean)


@pytest.mark.parametrize("bad", [torch.zeros(3, 5), torch.zeros(3, 6).double(), torch.zeros(6, 3).t(), torch.zeros(6)])
def test_other_shapes_types_and_layouts_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gate_up: expected contiguous torch.float32"):
        gated(bad, "silu")
