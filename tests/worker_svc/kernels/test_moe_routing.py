from typing import Any

import pytest
import torch

from worker_svc.kernels.moe_routing import CHUNK, align, align_reference, route, route_reference

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 2), (5, 7, 3), (9, 33, 8)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"renormalize": False}, {"scoring": "sigmoid", "factor": 2.5}, {"scoring": "sigmoid", "bias": True}],
    ids=str,
)
def test_routes_equal_their_reference(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    num_tokens, num_experts, top_k = shape
    wide = torch.full((num_tokens, num_experts + 2), torch.nan)
    logits = wide[:, 1:-1].normal_()
    if "bias" in options:
        options = options | {"bias": torch.randn(num_experts)}
    routing, expected = route(logits, top_k, **options), route_reference(logits, top_k, **options)
    assert torch.equal(routing.experts, expected.experts)
    # Exponentials and quotients differ in their last places.
    torch.testing.assert_close(routing.weights, expected.weights, rtol=1e-6, atol=1e-7)


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    assert route(torch.zeros(2, 6), 3).experts.tolist() == [[0, 1, 2]] * 2


def test_large_logits_do_not_overflow() -> None:
    routing = route(torch.tensor([[1e4, -1e4, 1e4, 0.0]]), 2)
    assert routing.experts.tolist() == [[0, 2]]
    assert routing.weights.tolist() == [[0.5, 0.5]]


# The interpreter warns of what a device computes without a word.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_not_a_number_chooses_experts_that_exist_and_leaves_other_tokens_alone() -> None:
    logits = torch.randn(3, 5)
    expected = route_reference(logits, 2)
    logits[1, 2] = torch.nan
    routing = route(logits, 2)
    assert ((routing.experts >= 0) & (routing.experts < 5)).all()
    assert torch.equal(routing.experts[::2], expected.experts[::2])
    assert routing.weights[1].isnan().all()


def assert_aligned(experts: torch.Tensor, num_experts: int, block_t: int) -> None:
    alignment = align(experts, num_experts, block_t)
    expected = align_reference(experts, num_experts, block_t)
    used = expected.num_tiles
    assert used <= alignment.num_tiles
    assert torch.equal(alignment.tile_experts[:used], expected.tile_experts)
    assert (alignment.tile_experts[used:] == -1).all()
    assert torch.equal(alignment.pairs[: used * block_t], expected.pairs)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_t"),
    [(1, 8, 2, 16), (7, 5, 3, 16), (40, 3, 2, 32), (33, 130, 8, 16), (17, 1, 1, 16)],
)
def test_pairs_come_in_order_of_their_experts(num_tokens: int, num_experts: int, top_k: int, block_t: int) -> None:
    experts = torch.randint(0, num_experts, (num_tokens, top_k), dtype=torch.int32)
    assert_aligned(experts, num_experts, block_t)


@pytest.mark.parametrize("count", [15, 16, 17, 32])
def test_one_expert_may_have_all_pairs(count: int) -> None:
    assert_aligned(torch.full((count, 1), 3, dtype=torch.int32), 5, 16)


def test_many_pairs_are_put_in_order_by_several_programs() -> None:
    assert_aligned(torch.randint(0, 5, (CHUNK + 1, 2), dtype=torch.int32), 5, 128)


def test_an_expert_for_each_pair_fills_every_tile() -> None:
    alignment = align(torch.arange(6, dtype=torch.int32).view(3, 2), 6, 16)
    assert alignment.tile_experts.tolist() == list(range(6))


def test_no_tokens_have_no_tiles() -> None:
    experts = route(torch.ones(0, 4), 2).experts
    assert experts.shape == (0, 2)
    assert align(experts, 4, 16).num_tiles == 0


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="top_k is 5, expected 1 to 4"):
        route(torch.ones(2, 4), 5)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        route(torch.ones(2, 4), 2, bias=torch.ones(3))
    with pytest.raises(ValueError, match="experts is torch.int64, expected torch.int32"):
        align(torch.ones(2, 2, dtype=torch.int64), 4, 16)
    with pytest.raises(ValueError, match=r"experts has strides \(3, 1\), expected contiguous rows"):
        align(torch.ones(2, 3, dtype=torch.int32)[:, :2], 4, 16)
