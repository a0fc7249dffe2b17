"""Quantized folders and quantized loading end in a model that computes what the weights mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.quantized_folders import (
    Encoded,
    Encoder,
    encode_awq,
    encode_fp8,
    encode_gptq,
    encode_int8,
    encode_packed,
    scattered_groups,
    write_quantized,
)
from tests.support.steps import Driver, make_runner
from weft.errors import SettingsError
from worker_svc.quantization import QUANTIZERS
from worker_svc.source import resolve_quantize

TOKENS = [(7 * i + 3) % 128 for i in range(45)]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}


def compressed(held_as: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": held_as, "config_groups": groups, "ignore": ["lm_head"]}


def encode_scattered(rows: int, columns: int) -> Encoded:
    """Every linear with an order of its own, so that none can be fused."""
    seed = int(torch.randint(2**31, ()))
    return encode_gptq(rows, columns, groups=scattered_groups(columns, 16, seed))


def encode_mixed(rows: int, columns: int) -> Encoded:
    """Of q, k and v two are int8, and one is int4."""
    return encode_int8(rows, columns) if rows == 16 else encode_packed(rows, columns)


def logits(folder: Path, **settings: Any) -> torch.Tensor:
    (rows,) = Driver(make_runner(folder, **settings), [TOKENS]).play([{0: 20}, {0: 25}])
    return rows


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    ("config", "encode"),
    [
        (GPTQ, encode_gptq),
        (GPTQ | {"desc_act": True}, encode_scattered),
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, encode_awq),
        (compressed("int-quantized", strategy="channel"), encode_int8),
        (compressed("float-quantized", strategy="channel", type="float"), encode_fp8),
        (compressed("pack-quantized", num_bits=4, strategy="group", group_size=16), encode_packed),
    ],
    ids=["gptq", "gptq_each_in_its_order", "awq", "int8", "fp8", "packed"],
)
def test_quantized_folder_computes_what_its_weights_mean(
    tmp_path: Path, config: Mapping[str, Any], encode: Encoder
) -> None:
    folder = write_quantized(tmp_path, dict(config), encode)
    # A CPU rounds weights and activations to int8, row by row, which costs 1 % a linear; wrong rows, columns or scales
    # cost 100 %. How errors add up depends on the random weights: 3 to 11 % were seen.
    assert difference(logits(folder), logits(folder / "floats")) < 0.3


def test_parts_that_were_quantized_in_different_ways_stand_side_by_side(tmp_path: Path) -> None:
    packed = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}
    int8 = {"targets": [r"re:.*\.[kv]_proj"], "weights": {"strategy": "channel"}, "format": "int-quantized"}
    config = compressed("pack-quantized") | {"config_groups": {"a": packed, "b": int8}}
    folder = write_quantized(tmp_path, config, encode_mixed)
    assert difference(logits(folder), logits(folder / "floats")) < 0.3


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied"])
def test_floats_are_quantized_at_load(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = make_checkpoint(tmp_path, tie_word_embeddings=tied)
    error = difference(logits(folder, quantize=kind), logits(folder))
    # Of random weights, which are as hard to quantize as any; 0 would mean that nothing was quantized.
    assert 1e-4 < error < {"int8": 0.1, "fp8": 0.3, "int4": 0.9}[kind]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "phi3", "gemma3_text"])
def test_every_shape_of_model_can_be_quantized_at_load(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family)
    assert difference(logits(folder, quantize="int8"), logits(folder)) < 0.2


def test_int8_as_a_type_is_floats_with_linears_of_int8(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    assert torch.equal(logits(folder, dtype="int8"), logits(folder, dtype="auto", quantize="int8"))


def test_blocks_of_a_quantized_model_are_not_those_of_the_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    assert make_runner(folder).layout != make_runner(folder, quantize="int8").layout


@pytest.mark.parametrize("quantize", ["int4", "fp8"])
def test_settings_that_contradict_each_other_are_refused(quantize: str) -> None:
    with pytest.raises(SettingsError, match=f"dtype: int8 means --quantize int8, and quantize is {quantize}"):
        resolve_quantize("int8", quantize)


def test_quantized_folder_is_not_quantized_again(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, GPTQ, encode_gptq)
    with pytest.raises(SettingsError, match="is quantized already, by gptq"):
        make_runner(folder, dtype="int8")
