"""GPTQ folders mean what their fields say, in any order of groups; what makes no sense is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.quantized_folders import (
    Encoded,
    assert_means_its_floats,
    change,
    change_config,
    encode_gptq,
    read_weights,
    refusal,
    scattered_groups,
    write_quantized,
)
from worker_svc.quantization import Int4Weight, Int8Weight, Reordered

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def encode_in_order_of_activations(rows: int, columns: int) -> Encoded:
    # Linears of one input get one order, as from GPTQ itself; 32 and 48 columns are two inputs.
    return encode_gptq(rows, columns, groups=scattered_groups(columns, 16, seed=columns))


def write(folder: Path, **config: Any) -> Path:
    return write_quantized(folder, CONFIG | config, encode_gptq)


@pytest.mark.parametrize("group_size", [16, 8, -1])
def test_each_column_has_the_zero_and_scale_of_its_group(tmp_path: Path, group_size: int) -> None:
    def encode(rows: int, columns: int) -> Encoded:
        return encode_gptq(rows, columns, group_size=columns if group_size == -1 else group_size)

    assert_means_its_floats(write_quantized(tmp_path, CONFIG | {"group_size": group_size}, encode))


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_zeros_of_the_second_version_are_as_they_are(tmp_path: Path, key: str) -> None:
    assert_means_its_floats(write_quantized(tmp_path, CONFIG | {key: "gptq_v2"}, partial(encode_gptq, less=0)))


def test_groups_in_the_order_of_activations_come_reordered(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG | {"desc_act": True}, encode_in_order_of_activations)
    assert_means_its_floats(folder)
    assert isinstance(read_weights(folder)[Q_PROJ], Reordered)


def test_static_groups_in_order_need_no_reordering(tmp_path: Path) -> None:
    folder = write(tmp_path, desc_act=True)
    assert isinstance(read_weights(folder)[Q_PROJ], Int4Weight)


def test_old_folders_without_groups_by_channel_are_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path)
    change(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("g_idx")])
    assert_means_its_floats(folder)


def test_eight_symmetric_bits_are_int8(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG | {"bits": 8}, partial(encode_gptq, bits=8))
    assert_means_its_floats(folder)
    assert isinstance(read_weights(folder)[Q_PROJ], Int8Weight)


def test_linears_that_were_left_out_stay_floats(tmp_path: Path) -> None:
    folder = write(tmp_path, dynamic={r"-:.*\.q_proj": {}})
    floats = torch.randn(32, 32)

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{Q_PROJ}.{suffix}"]
        tensors[f"{Q_PROJ}.weight"] = floats

    change(folder, leave_out)
    weight = read_weights(folder)[Q_PROJ]
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, floats)


def test_biases_of_zeros_that_the_model_has_not_are_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path)
    change(folder, lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.zeros(32)}))
    read_weights(folder)
    change(folder, lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.ones(32)}))
    assert f"unknown: {Q_PROJ}.bias" in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"bits": 3}, "quantization_config: bits is 3; known are 4, 8"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 24}, "in groups of 24"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "16"}, "group_size is '16'"),
        ({"group_size": 8}, "down_proj.scales is [3, 32] instead of [6, 32]"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format is True"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic has '+:.*'"),
        ({"dynamic": {"-:(": {}}}, "dynamic has '('"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    folder = write(tmp_path)
    change_config(folder, **keys)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda tensors: tensors.pop(f"{Q_PROJ}.scales"), f"missing: {Q_PROJ}.scales"),
        (lambda tensors: tensors.pop(f"{Q_PROJ}.qzeros"), f"missing: {Q_PROJ}.qzeros"),
        (lambda tensors: tensors.update({f"{Q_PROJ}.scales": torch.ones(3, 32)}), f"{Q_PROJ}.scales is [3, 32]"),
        (lambda tensors: tensors[f"{Q_PROJ}.scales"].fill_(torch.inf), f"{Q_PROJ} has scales that are no finite"),
        (lambda tensors: tensors[f"{Q_PROJ}.g_idx"].fill_(1), f"{Q_PROJ}.g_idx does not name 2 groups of 16"),
        (
            lambda tensors: tensors.update({f"{Q_PROJ}.qweight": torch.zeros(4, 32)}),
            f"{Q_PROJ}.qweight is of type F32, which is none of I32",
        ),
    ],
    ids=["no_scales", "no_zeros", "wrong_number_of_groups", "infinite", "no_such_groups", "floats"],
)
def test_tensors_that_make_no_sense_are_named(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], named: str
) -> None:
    folder = write(tmp_path)
    change(folder, edit)
    assert named in refusal(folder)


def test_asymmetric_eight_bits_are_refused(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, CONFIG | {"bits": 8}, partial(encode_gptq, bits=8))
    change(folder, lambda tensors: tensors[f"{Q_PROJ}.qzeros"].fill_(0))
    assert f"{Q_PROJ}.qzeros" in refusal(folder)


def test_missing_order_is_named_where_the_config_promises_one(tmp_path: Path) -> None:
    folder = write(tmp_path, desc_act=True)
    change(folder, lambda tensors: tensors.pop(f"{Q_PROJ}.g_idx"))
    assert f"missing: {Q_PROJ}.g_idx" in refusal(folder)
