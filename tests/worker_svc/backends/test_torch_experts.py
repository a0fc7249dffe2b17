"""Mixtures of experts against their formula, and routing."""

from __future__ import annotations

import pytest
import torch

from worker_svc.backends.backend import Activation, Experts, Routing
from worker_svc.backends.torch_experts import EveryExpert, TorchExperts, gated, route
from worker_svc.backends.torch_layers import make_linear

HIDDEN, INNER = 12, 7


def make_weights(num_experts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(2 * INNER, HIDDEN), torch.randn(HIDDEN, INNER)) for _ in range(num_experts)]


def build(kind: type, weights: list[tuple[torch.Tensor, torch.Tensor]], activation: Activation) -> Experts:
    linears = [(make_linear(gate_up), make_linear(down)) for gate_up, down in weights]
    if kind is TorchExperts:
        return TorchExperts(linears, activation)
    return EveryExpert(linears, lambda gate_up: gated(gate_up, activation))


def reference(
    x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Token by token in float64, with SiLU."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token, (ids, its) in enumerate(zip(expert_ids.tolist(), weights.double(), strict=True)):
        for expert, weight in zip(ids, its, strict=True):
            gate_up, down = (w.double() for w in experts[expert])
            gate, up = (gate_up @ x[token].double()).chunk(2)
            total[token] += weight * (down @ (gate * gate.sigmoid() * up))
    return total


@pytest.mark.parametrize("kind", [TorchExperts, EveryExpert])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen"), [(1, 1, 1), (1, 5, 3), (2, 3, 3), (17, 4, 2), (3, 40, 7)]
)
def test_tokens_get_the_weighted_sum_of_their_experts(
    kind: type, seed: int, num_tokens: int, num_experts: int, num_chosen: int
) -> None:
    torch.manual_seed(seed)
    weights = make_weights(num_experts)
    x, residual = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, HIDDEN)
    expert_ids = torch.stack([torch.randperm(num_experts)[:num_chosen] for _ in range(num_tokens)])
    shares = torch.rand(num_tokens, num_chosen)
    expected = residual.double() + reference(x, expert_ids, shares, weights)
    found = build(kind, weights, "silu").add(x, expert_ids, shares, residual)
    # Sums of up to 7 experts of magnitude 100, in float32.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_both_ways_agree_with_the_other_activation_and_type() -> None:
    torch.manual_seed(0)
    weights = [(gate_up.bfloat16() / 4, down.bfloat16() / 4) for gate_up, down in make_weights(4)]
    x = torch.randn(9, HIDDEN).bfloat16()
    shares, expert_ids = torch.randn(9, 4).softmax(-1).topk(2)
    one, other = (
        build(kind, weights, "gelu_tanh").add(x, expert_ids, shares, torch.zeros_like(x))
        for kind in (TorchExperts, EveryExpert)
    )
    assert one.dtype == other.dtype == torch.bfloat16
    # bfloat16 has 8 bits, and the two round at different places.
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_the_best_experts_weigh_what_the_softmax_gives_them() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    expert_ids, weights = route(logits, Routing(2, is_normalized=False))
    assert expert_ids.tolist() == [[1, 2], [2, 0]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, expert_ids))


def test_normalized_weights_add_up_to_the_scale() -> None:
    torch.manual_seed(0)
    _, weights = route(torch.randn(5, 8), Routing(3, is_normalized=True, scale=2.5))
    torch.testing.assert_close(weights.sum(-1), torch.full((5,), 2.5))


def test_experts_are_chosen_from_the_groups_with_the_largest_scores() -> None:
    # Groups of two: the best of each are 5, 4 and 3, so the last group is out, though its second is above the others'.
    logits = torch.tensor([[5.0, 0.0, 4.0, 1.0, 3.0, 2.9]])
    expert_ids, weights = route(logits, Routing(3, is_normalized=False, num_groups=3, groups_per_token=2))
    assert expert_ids.tolist() == [[0, 2, 3]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, expert_ids))
