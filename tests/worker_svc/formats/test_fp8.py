"""Folders of 8-bit floats, with a scale for all, for each row, or for each block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.quantized_folders import (
    Encoder,
    assert_means_its_floats,
    change,
    change_config,
    encode_fp8,
    encode_fp8_blocks,
    read_weights,
    refusal,
    write_quantized,
)
from worker_svc.quantization import Fp8Weight

CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
UP_PROJ = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "encode",
    [
        partial(encode_fp8, num_scales=1),
        partial(encode_fp8, num_scales=1, scale="weight_scale_inv"),
        encode_fp8,
    ],
    ids=["one_scale", "one_scale_by_its_other_name", "one_a_row"],
)
def test_weights_are_values_times_scales(tmp_path: Path, encode: Encoder) -> None:
    folder = write_quantized(tmp_path, CONFIG, encode)
    assert_means_its_floats(folder)
    assert isinstance(read_weights(folder)[UP_PROJ], Fp8Weight)


def test_blocks_become_floats(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG | {"weight_block_size": [20, 20]}, encode_fp8_blocks)
    assert_means_its_floats(folder)
    assert isinstance(read_weights(folder)[UP_PROJ], torch.Tensor)


def test_scales_of_activations_and_of_the_cache_are_not_read(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG | {"activation_scheme": "static"}, encode_fp8)
    scales = {f"{UP_PROJ}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    change(folder, lambda tensors: tensors.update(scales))
    assert_means_its_floats(folder)


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_linears_that_were_left_out_stay_floats(tmp_path: Path, key: str) -> None:
    folder = write_quantized(tmp_path, CONFIG | {key: [UP_PROJ]}, encode_fp8)
    floats = torch.randn(48, 32)

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{UP_PROJ}.weight_scale"]
        tensors[f"{UP_PROJ}.weight"] = floats

    change(folder, leave_out)
    weight = read_weights(folder)[UP_PROJ]
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, floats)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"weight_block_size": [128]}, "weight_block_size is [128], not [rows, columns]"),
        ({"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
        ({"weight_block_size": [20, 20]}, "missing: model.layers.0.mlp.down_proj.weight_scale_inv"),
        ({"ignored_layers": [3]}, "ignored_layers is [3]"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    folder = write_quantized(tmp_path, CONFIG, encode_fp8)
    change_config(folder, **keys)
    assert named in refusal(folder)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG, encode_fp8)
    change(folder, lambda tensors: tensors.pop(f"{UP_PROJ}.weight_scale"))
    assert f"missing: {UP_PROJ}.weight_scale" in refusal(folder)
