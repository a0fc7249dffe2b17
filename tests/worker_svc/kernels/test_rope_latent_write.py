"""The latent cache's write against its reference and against the models' own rotation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from worker_svc import rope
from worker_svc.kernels.rope_latent_write import rope_latent_write, rope_latent_write_reference
from worker_svc.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("device_rounding")

NUM_SLOTS = 32
# Products and sums are fused in another way, which may move a rounding by one place of the type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    latent: torch.Tensor
    key: torch.Tensor
    turns: torch.Tensor
    slots: torch.Tensor
    cache: torch.Tensor

    def columns(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.latent, self.key, self.turns, self.slots, self.cache

    def copy(self) -> Inputs:
        return replace(self, q=self.q.clone(), cache=self.cache.clone())


def make_inputs(num_tokens: int, num_heads: int, rank: int, rotary: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Latent and key are slices of one tensor, as a matmul gives them; what nobody owns is not a number."""
    both = torch.randn(num_tokens, rank + rotary).to(dtype)
    turns = rope.turns(torch.randint(1000, (num_tokens,)), rope.frequencies(rope.Rope(1e4), rotary))
    return Inputs(
        q=torch.randn(num_tokens, num_heads, rank + rotary).to(dtype),
        latent=both[:, :rank],
        key=both[:, rank:],
        turns=torch.view_as_real(turns)[:, 0],
        slots=torch.randperm(NUM_SLOTS)[:num_tokens],
        cache=torch.full((NUM_SLOTS, rank + rotary), torch.nan).to(dtype),
    )


def assert_near(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


SHAPES = {"one of each": (1, 1, 2, 2), "even": (4, 8, 32, 16), "odd": (7, 5, 11, 6), "one prime": (3, 17, 13, 10)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_is_rotated_and_latent_and_key_are_written(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, dtype)
    expected = inputs.copy()
    rope_latent_write_reference(*expected.columns())
    rope_latent_write(*inputs.columns(), config=Config({"BLOCK": 64}, num_warps=1))
    assert_near(inputs.q, expected.q, TOLERANCE[dtype])
    assert_near(inputs.cache, expected.cache, TOLERANCE[dtype])
    assert int(inputs.cache[:, 0].isfinite().sum()) == shape[0]


def test_reference_rotates_as_the_models_do() -> None:
    inputs = make_inputs(3, 2, 4, 6)
    q, key = inputs.q[..., 4:].clone(), inputs.key[:, None].clone()
    rope_latent_write_reference(*inputs.columns())
    for x in (q, key):
        rope.rotate_(x, torch.view_as_complex(inputs.turns)[:, None])
    assert_near(inputs.q[..., 4:], q, 1e-6)
    assert_near(inputs.cache[inputs.slots, 4:], key[:, 0], 1e-6)


def test_rows_without_a_slot_change_nothing() -> None:
    inputs = make_inputs(5, 3, 8, 4)
    inputs.slots[1::2] = -1
    before = inputs.copy()
    rope_latent_write(*inputs.columns())
    assert torch.equal(inputs.q[1::2], before.q[1::2])
    assert int(inputs.cache[:, 0].isfinite().sum()) == 3


def test_strided_q_is_rotated_in_place() -> None:
    inputs = make_inputs(4, 3, 8, 4)
    wide = torch.randn(4, 3, 20)
    strided = replace(inputs, q=wide[..., 3:15])
    expected = replace(inputs.copy(), q=wide[..., 3:15].clone())
    untouched = wide.clone()
    rope_latent_write_reference(*expected.columns())
    rope_latent_write(*strided.columns())
    assert_near(strided.q, expected.q, 2e-6)
    assert torch.equal(wide[..., :3], untouched[..., :3])


def test_no_tokens_are_no_work() -> None:
    rope_latent_write(*make_inputs(0, 2, 4, 2).columns())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("q", torch.randn(4, 3, 11)),
        ("q", torch.randn(12, 4, 3).transpose(0, 1).transpose(1, 2)),
        ("latent", torch.randn(4, 7)),
        ("key", torch.randn(4, 5)),
        ("key", torch.randn(4, 4).half()),
        ("turns", torch.randn(4, 2)),
        ("turns", torch.randn(5, 2, 2)),
        ("slots", torch.zeros(4, dtype=torch.int32)),
        ("cache", torch.randn(32, 24)[:, ::2]),
    ],
)
def test_a_wrong_tensor_is_named(name: str, wrong: torch.Tensor) -> None:
    inputs = replace(make_inputs(4, 3, 8, 4), **{name: wrong})
    with pytest.raises(ValueError, match=f"^{name} "):
        rope_latent_write(*inputs.columns())
