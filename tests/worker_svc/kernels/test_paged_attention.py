"""Paged attention in Triton's interpreter against its reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lab.gpu.attention_steps import Lengths, Shape, Step, make_step
from weft.hashing import BLOCK_SIZE
from worker_svc.kernels.paged_attention import default_config, paged_attention
from worker_svc.kernels.tuning import Config
from worker_svc.kernels.varlen import StepKind, plan_launch, step_kind

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")

CPU = torch.device("cpu")
FLOAT = torch.float32
# Sums in another order for float32; else the weights and the output are rounded, by half of the last place each.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
LENGTHS: dict[str, Lengths] = {
    "one token": ([1], [1]),
    "decodes": ([1, 1, 1], [17, 1, 47]),
    "prefill": ([33], [33]),
    "chunks": ([7, 17], [15, 50]),
    "mixed with an empty sequence": ([1, 20, 0, 1], [31, 36, 5, 16]),
}
# Rows of a tile and keys of a tile: masks everywhere, and whole tiles without.
SMALL, LARGE = Config({"BLOCK_M": 16, "BLOCK_N": 16}), Config({"BLOCK_M": 64, "BLOCK_N": 16})
SPLIT = Config({"BLOCK_M": 16, "BLOCK_N": 128})


@pytest.fixture(autouse=True)
def seed() -> None:
    print("seed", torch.seed())  # noqa: T201, shown when a test fails


def floats(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = FLOAT, **options: Any) -> Shape:
    return Shape(num_heads, num_kv_heads, head_dim, dtype=dtype, kv_dtype=dtype, **options)


def assert_equals_reference(step: Step, config: Config | None = None) -> None:
    out, expected = step.attend(config), step.expected()
    assert out.shape == (len(step.q), step.q[0].numel()) and out.dtype == step.q.dtype and out.is_contiguous()
    error = (out.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[step.q.dtype], float(error)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["masked tiles", "whole tiles"])
@pytest.mark.parametrize("window", [None, 21], ids="window {}".format)
def test_attention_equals_its_reference(lengths: Lengths, config: Config, window: int | None) -> None:
    assert_equals_reference(make_step(CPU, lengths, floats(2, 1, 16, window=window)), config)


@pytest.mark.parametrize("heads", [(1, 1, 8), (7, 1, 24), (4, 2, 1), (20, 1, 16), (3, 3, 17)], ids=str)
def test_any_number_of_heads_and_any_head_dim(heads: tuple[int, int, int]) -> None:
    assert_equals_reference(make_step(CPU, ([1, 3], [18, 3]), floats(*heads)), SMALL)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("soft_cap", [None, 0.5])
def test_soft_cap_and_types(dtype: torch.dtype, soft_cap: float | None) -> None:
    assert_equals_reference(make_step(CPU, ([1, 4], [18, 20]), floats(2, 1, 16, dtype, soft_cap=soft_cap)), SMALL)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_cache_is_scaled_by_slot_and_head(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    step = make_step(CPU, ([1, 3], [18, 20]), Shape(2, 2, 16, window=1, dtype=dtype, kv_dtype=kv_dtype))
    assert_equals_reference(step, SMALL)


@pytest.mark.parametrize("lengths", [([1], [1500]), ([1, 1, 1], [513, 3, 900]), ([4, 2], [600, 40])], ids=str)
@pytest.mark.parametrize("window", [None, 700], ids="window {}".format)
def test_split_keys_are_merged(lengths: Lengths, window: int | None) -> None:
    step = make_step(CPU, lengths, floats(2, 1, 24, window=window))
    assert plan_launch(step.batch, len(step.q), 2, 1, 16, window).num_extra > 0
    assert_equals_reference(step, SPLIT)


@pytest.mark.parametrize("window", [None, 1030], ids="window {}".format)
def test_split_keys_of_large_tiles_are_merged(window: int | None) -> None:
    step = make_step(CPU, ([9], [1100]), floats(2, 1, 24, window=window))
    assert plan_launch(step.batch, 9, 2, 1, 64, window).num_extra > 0
    assert_equals_reference(step, Config({"BLOCK_M": 64, "BLOCK_N": 128}))


def test_split_may_hold_nothing_that_a_row_sees() -> None:
    assert_equals_reference(make_step(CPU, ([7], [1100]), floats(2, 1, 16, window=600)), SPLIT)


@pytest.mark.parametrize(
    ("kind", "lengths"), [("decode", ([1], [40])), ("mixed", ([9, 1], [40, 9])), ("prefill", ([64], [80]))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_choice_of_blocks(kind: StepKind, lengths: Lengths, dtype: torch.dtype) -> None:
    step = make_step(CPU, lengths, floats(2, 1, 16, dtype))
    assert step_kind(step.batch, len(step.q), 2) == kind
    assert_equals_reference(step)


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["masked tiles", "whole tiles"])
def test_rows_and_sequences_that_pad_a_step_are_zero_and_read_nothing(config: Config) -> None:
    step = make_step(CPU, ([3, 0, 1], [20, 1, 7]), floats(2, 1, 16), num_padding_rows=5)
    lens = torch.tensor([20, 2**31 - 1, 7], dtype=torch.int32)
    step.q[4:] = torch.nan
    padded = dataclasses.replace(step, batch=dataclasses.replace(step.batch, seq_lens=lens))
    out = padded.attend(config)
    assert torch.equal(out[:4], step.attend(config)[:4]) and not out[:4].isnan().any()
    assert (out[4:] == 0).all()


def test_not_a_number_in_one_sequence_leaves_its_neighbours_as_they_were() -> None:
    step = make_step(CPU, ([1, 4, 1], [600, 20, 7]), floats(2, 1, 16))
    before = step.attend(SPLIT)
    step.q[2] = torch.nan
    after = step.attend(SPLIT)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(after[others], before[others]) and after[2].isnan().all()


def test_a_step_does_not_write_its_inputs() -> None:
    step = make_step(CPU, ([1, 4], [30, 20]), floats(2, 1, 16))
    q, kv = step.q.clone(), step.kv.clone()
    step.attend()
    assert torch.equal(step.q, q) and torch.equal(step.kv.nan_to_num(), kv.nan_to_num())


def wrong(**changes: Any) -> Any:
    q = torch.zeros(2, 4, 16)
    kv = torch.zeros(4, 2 * BLOCK_SIZE, 16)
    return {"q": q, "kv": kv, "softmax_scale": 1.0} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 64)}, r"q and kv have shapes .*expected \[T, H, D\]"),
        ({"q": torch.zeros(2, 3, 16)}, "kv has 4 heads of K and V, expected twice a divisor of q's 3"),
        ({"q": torch.zeros(2, 16, 4).transpose(1, 2)}, "q has stride 4 in its last dimension, expected 1"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.float64)}, "q is torch.float64, expected float32"),
        ({"kv": torch.zeros(4, 32, 8)}, r"kv has shape \(4, 32, 8\), expected \(4, 32, 16\)"),
        ({"kv": torch.zeros(4, 30, 16)}, "kv has 30 slots, expected a multiple of 16"),
        ({"kv": torch.zeros(4, 32, 16, dtype=torch.bfloat16)}, "kv is torch.bfloat16, expected torch.float32"),
        ({"kv": torch.zeros(4, 32, 16, dtype=torch.int8)}, "kv is torch.int8, expected kv_scales with it"),
        ({"kv_scales": torch.zeros(4, 32)}, "expected kv_scales only with int8 or fp8"),
        (
            {"kv": torch.zeros(4, 32, 16, dtype=torch.int8), "kv_scales": torch.zeros(4, 16)},
            r"kv_scales has shape \(4, 16\), expected \(4, 32\)",
        ),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0, expected it positive"),
        ({"window": 0}, "window is 0, expected it positive"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0, expected it positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    batch = make_step(CPU, ([1, 1], [3, 4]), floats(4, 2, 16)).batch
    with pytest.raises(ValueError, match=message):
        paged_attention(batch=batch, **wrong(**changes))


def test_default_blocks_fit_the_shared_memory_of_a_hopper_gpu() -> None:
    for kind in ("decode", "mixed", "prefill"):
        for head_dim in (64, 128, 256):
            config = default_config(kind, head_dim, torch.bfloat16)
            keys = 2 * config.blocks["BLOCK_N"] * config.num_stages
            assert 2 * head_dim * (keys + config.blocks["BLOCK_M"]) <= 227 * 1024
