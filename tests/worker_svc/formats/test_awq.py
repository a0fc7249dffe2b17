"""AWQ folders mean what their fields say; what is packed in another way is refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.quantized_folders import (
    assert_means_its_floats,
    change,
    change_config,
    encode_awq,
    read_weights,
    refusal,
    write_quantized,
)

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
K_PROJ = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("group_size", [8, 16])
def test_each_column_has_the_zero_and_scale_of_its_group(tmp_path: Path, group_size: int) -> None:
    config = CONFIG | {"group_size": group_size}
    assert_means_its_floats(write_quantized(tmp_path, config, partial(encode_awq, group_size=group_size)))


def test_the_config_of_the_quantizer_itself_is_understood(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "version": "GEMM"}
    assert_means_its_floats(write_quantized(tmp_path, config, encode_awq))


def test_linears_that_were_left_out_stay_floats(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG | {"modules_to_not_convert": ["k_proj"]}, encode_awq)
    floats = torch.randn(16, 32)

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{K_PROJ}.{suffix}"]
        tensors[f"{K_PROJ}.weight"] = floats

    change(folder, leave_out)
    weight = read_weights(folder)[K_PROJ]
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, floats)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"bits": 8}, "quantization_config: bits is 8; known are 4"),
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"backend": "llm-awq"}, "backend is 'llm-awq'"),
        ({"group_size": 24}, "in groups of 24"),
        ({"group_size": 32}, "down_proj.qzeros is [4, 4] instead of [2, 4]"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert is 'gate'"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    folder = write_quantized(tmp_path, CONFIG, encode_awq, intermediate_size=64)
    change_config(folder, **keys)
    assert named in refusal(folder)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG, encode_awq)
    change(folder, lambda tensors: tensors.pop(f"{K_PROJ}.scales"))
    assert f"missing: {K_PROJ}.scales" in refusal(folder)
