"""Latent attention in Triton's interpreter against its reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lab.gpu.attention_steps import LatentShape, LatentStep, Lengths, make_latent_step
from worker_svc.kernels.mla_attention import mla_attention
from worker_svc.kernels.tuning import Config
from worker_svc.kernels.varlen import plan_launch

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")

CPU = torch.device("cpu")
# Sums in another order for float32; else the weights and the output are rounded, by half of the last place each.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
LENGTHS: dict[str, Lengths] = {
    "one token": ([1], [1]),
    "decodes": ([1, 1, 1], [17, 1, 47]),
    "chunks": ([3, 9], [15, 50]),
    "mixed with an empty sequence": ([1, 5, 0, 1], [31, 20, 5, 16]),
}
SMALL = Config({"BLOCK_M": 16, "BLOCK_N": 16})


@pytest.fixture(autouse=True)
def seed() -> None:
    print("seed", torch.seed())  # noqa: T201, shown when a test fails


def floats(num_heads: int, latent_dim: int, rope_dim: int, dtype: torch.dtype = torch.float32) -> LatentShape:
    return LatentShape(num_heads, latent_dim, rope_dim, dtype)


def assert_equals_reference(step: LatentStep, config: Config | None = None) -> None:
    out, expected = step.attend(config), step.expected()
    assert out.shape == (*step.q.shape[:2], step.shape.latent_dim) and out.dtype == step.q.dtype
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[step.q.dtype], float(error)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_equals_its_reference(lengths: Lengths, dtype: torch.dtype) -> None:
    assert_equals_reference(make_latent_step(CPU, lengths, floats(4, 32, 16, dtype)), SMALL)


@pytest.mark.parametrize(("num_heads", "dims"), [(1, (16, 8)), (16, (24, 4)), (20, (17, 1)), (7, (40, 24))], ids=str)
def test_any_number_of_heads_and_any_dims(num_heads: int, dims: tuple[int, int]) -> None:
    assert_equals_reference(make_latent_step(CPU, ([1, 2], [18, 2]), floats(num_heads, *dims)), SMALL)


def test_split_keys_are_merged_over_all_heads_and_columns() -> None:
    step = make_latent_step(CPU, ([1], [1100]), floats(17, 136, 16))
    assert plan_launch(step.batch, 1, 17, 1, 16, None).num_extra > 0
    assert_equals_reference(step, Config({"BLOCK_M": 16, "BLOCK_N": 128}))


@pytest.mark.parametrize("lengths", [([1], [40]), ([5], [40])], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_choice_of_blocks(lengths: Lengths, dtype: torch.dtype) -> None:
    assert_equals_reference(make_latent_step(CPU, lengths, floats(4, 32, 16, dtype)))


def test_rows_and_sequences_that_pad_a_step_are_zero_and_read_nothing() -> None:
    step = make_latent_step(CPU, ([3, 0, 1], [20, 1, 7]), floats(4, 32, 16), num_padding_rows=5)
    lens = torch.tensor([20, 2**31 - 1, 7], dtype=torch.int32)
    step.q[4:] = torch.nan
    padded = dataclasses.replace(step, batch=dataclasses.replace(step.batch, seq_lens=lens))
    out = padded.attend(SMALL)
    assert torch.equal(out[:4], step.attend(SMALL)[:4]) and not out[:4].isnan().any()
    assert (out[4:] == 0).all()


def test_strided_inputs() -> None:
    step = make_latent_step(CPU, ([1, 2], [18, 20]), floats(4, 32, 16))
    q, cache = torch.randn(3, 4, 96), torch.full((len(step.cache), 64), torch.nan)
    cache[:, :48] = step.cache
    assert_equals_reference(dataclasses.replace(step, q=q[..., 48:], cache=cache[:, :48]), SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 64)}, r"q and cache have shapes .*expected \[T, H, R \+ P\]"),
        ({"q": torch.zeros(2, 48, 4).transpose(1, 2)}, "q has stride 4 in its last dimension, expected 1"),
        ({"q": torch.zeros(2, 4, 48, dtype=torch.float64)}, "q is torch.float64, expected float32"),
        ({"cache": torch.zeros(32, 40)}, r"cache has shape \(32, 40\), expected \(32, 48\)"),
        ({"cache": torch.zeros(30, 48)}, "cache has 30 slots, expected a multiple of 16"),
        ({"cache": torch.zeros(32, 48, dtype=torch.bfloat16)}, "cache is torch.bfloat16, expected torch.float32"),
        ({"latent_dim": 48}, "latent_dim is 48, expected it between 0 and q's 48"),
        ({"softmax_scale": -1.0}, "softmax_scale is -1.0, expected it positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    step = make_latent_step(CPU, ([1, 1], [3, 4]), floats(4, 32, 16))
    arguments = {"q": step.q, "cache": step.cache, "latent_dim": 32, "softmax_scale": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        mla_attention(batch=step.batch, **arguments)
