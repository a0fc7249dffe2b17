"""compressed-tensors folders mean what their fields say, and what the package that writes them says they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.quantized_folders import (
    Encoded,
    Encoder,
    assert_means_its_floats,
    change,
    encode_fp8,
    encode_fp8_blocks,
    encode_int8,
    encode_packed,
    read_weights,
    refusal,
    scattered_groups,
    write_quantized,
)
from worker_svc.formats import compressed_tensors
from worker_svc.models.config import ConfigReader
from worker_svc.quantization import Reordered, in_float
from worker_svc.weights import Checkpoint

# Written and read back by compressed-tensors 0.20.0 itself: `<scheme>.meant` is what it reads from the other tensors.
GOLDEN = Path("tests/data/compressed_tensors")
SCHEMES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "config.json").read_text())["config_groups"]
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
O_PROJ = "model.layers.0.self_attn.o_proj"


def config(held_as: str, weights: dict[str, Any], **keys: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": held_as,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | keys


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_mean_what_the_package_that_wrote_them_reads(name: str) -> None:
    golden = load_file(GOLDEN / "model.safetensors")
    reader = ConfigReader(json.loads((GOLDEN / "config.json").read_text()), "golden")
    meant = golden[f"{name}.meant"]
    with Checkpoint(GOLDEN, compressed_tensors.read(reader, "golden")) as checkpoint:
        weight = checkpoint.weight(name, tuple(meant.shape))
    assert torch.equal(in_float(weight), meant)


@pytest.mark.parametrize(
    ("held_as", "weights", "encode"),
    [
        ("int-quantized", INT8, encode_int8),
        ("naive-quantized", INT8, encode_int8),
        ("int-quantized", INT8 | {"strategy": "tensor"}, partial(encode_int8, num_scales=1)),
        ("float-quantized", FP8, encode_fp8),
        ("float-quantized", FP8 | {"strategy": "tensor"}, partial(encode_fp8, num_scales=1)),
        (
            "float-quantized",
            FP8 | {"strategy": "block", "block_structure": [20, 20]},
            partial(encode_fp8_blocks, scale="weight_scale"),
        ),
        ("pack-quantized", INT4, encode_packed),
        ("pack-quantized", INT4 | {"symmetric": False}, partial(encode_packed, is_symmetric=False)),
        ("pack-quantized", INT4 | {"num_bits": 8}, partial(encode_packed, bits=8)),
        ("pack-quantized", INT4 | {"strategy": None}, encode_packed),
    ],
)
def test_weights_mean_what_their_fields_say(
    tmp_path: Path, held_as: str, weights: dict[str, Any], encode: Encoder
) -> None:
    assert_means_its_floats(write_quantized(tmp_path, config(held_as, weights), encode))


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_groups_in_the_order_of_activations_come_reordered(tmp_path: Path, is_symmetric: bool) -> None:
    def encode(rows: int, columns: int) -> Encoded:
        return encode_packed(
            rows, columns, is_symmetric=is_symmetric, groups=scattered_groups(columns, 16, seed=columns)
        )

    weights = INT4 | {"actorder": "group", "symmetric": is_symmetric}
    folder = write_quantized(tmp_path, config("pack-quantized", weights), encode)
    assert_means_its_floats(folder)
    assert isinstance(read_weights(folder)[O_PROJ], Reordered)


def test_an_order_that_was_never_set_is_none(tmp_path: Path) -> None:
    def encode(rows: int, columns: int) -> Encoded:
        tensors, meant = encode_packed(rows, columns)
        return tensors | {"weight_g_idx": torch.full((columns,), -1, dtype=torch.int32)}, meant

    assert_means_its_floats(write_quantized(tmp_path, config("pack-quantized", INT4 | {"actorder": "group"}), encode))


def test_a_linear_has_the_scheme_of_its_name_before_that_of_all(tmp_path: Path) -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": INT8, "format": "int-quantized"},
        "group_1": {"targets": [r"re:.*\.down_proj$"], "weights": INT4, "format": "pack-quantized"},
        "group_2": {"targets": [O_PROJ], "weights": None},
    }

    def encode(rows: int, columns: int) -> Encoded:
        return encode_packed(rows, columns) if columns == 48 else encode_int8(rows, columns)

    folder = write_quantized(tmp_path, config("mixed-precision", INT8, config_groups=groups), encode)
    floats = load_file(folder / "floats/model.safetensors")

    def put_back(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{O_PROJ}.weight_scale"]
        tensors[f"{O_PROJ}.weight"] = floats[f"{O_PROJ}.weight"]

    change(folder, put_back)
    assert_means_its_floats(folder)


@pytest.mark.parametrize("ignored", [O_PROJ, r"re:.*layers\.0\.self_attn\.o_"])
def test_linears_that_are_ignored_are_floats(tmp_path: Path, ignored: str) -> None:
    folder = write_quantized(tmp_path, config("int-quantized", INT8, ignore=["lm_head", ignored]), encode_int8)
    change(folder, lambda tensors: tensors.pop(f"{O_PROJ}.weight_scale"))
    assert f"{O_PROJ}.weight is of type I8, which is none of F32, F16, BF16" in refusal(folder)
    change(folder, lambda tensors: tensors.update({f"{O_PROJ}.weight": torch.randn(32, 32)}))
    assert isinstance(read_weights(folder)[O_PROJ], torch.Tensor)


def test_scales_of_activations_and_of_the_cache_are_not_read(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, config("int-quantized", INT8), encode_int8)
    scales = {f"{O_PROJ}.input_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(1)}
    change(folder, lambda tensors: tensors.update(scales))
    assert_means_its_floats(folder)


@pytest.mark.parametrize(
    ("held_as", "keys", "named"),
    [
        ("int-quantized", {"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ("int-quantized", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format is 'sparse-24-bitmask'"),
        ("int-quantized", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ("int-quantized", {"ignore": ["re:("]}, "ignore has '('"),
        ("int-quantized", {"config_groups": {"W8A8": ["Linear"]}}, "W8A8 is ['Linear'], no object"),
        ("marlin-24", {}, "by channel as 'marlin-24' is not known"),
        ("float-quantized", {}, "int of 8 bits, symmetric, by channel as 'float-quantized' is not known"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, held_as: str, keys: dict[str, Any], named: str
) -> None:
    assert named in refusal(write_quantized(tmp_path, config(held_as, INT8, **keys), encode_int8))


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (INT8 | {"symmetric": False}, "int of 8 bits, asymmetric"),
        (INT8 | {"num_bits": 6}, "int of 6 bits"),
        (INT8 | {"strategy": "token"}, "strategy is 'token'"),
        (INT8 | {"strategy": "group", "group_size": 20}, "32 columns are no multiple of its groups' 20"),
    ],
)
def test_scheme_that_cannot_be_served_is_refused_by_name(tmp_path: Path, weights: dict[str, Any], named: str) -> None:
    assert named in refusal(write_quantized(tmp_path, config("int-quantized", weights), encode_int8))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda tensors: tensors.pop(f"{O_PROJ}.weight_scale"), f"missing: {O_PROJ}.weight_scale"),
        (lambda tensors: tensors[f"{O_PROJ}.weight_shape"].fill_(9), f"{O_PROJ}.weight_shape is [9, 9]"),
        (
            lambda tensors: tensors.update({f"{O_PROJ}.weight_scale": torch.ones(32, 3)}),
            f"{O_PROJ}.weight_scale is [32, 3] instead of [32, 2]",
        ),
    ],
    ids=["no_scales", "another_shape", "wrong_number_of_groups"],
)
def test_tensors_that_make_no_sense_are_named(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], named: str
) -> None:
    folder = write_quantized(tmp_path, config("pack-quantized", INT4), encode_packed)
    change(folder, edit)
    assert named in refusal(folder)


def test_zero_points_of_a_symmetric_scheme_must_be_zero(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, config("int-quantized", INT8), encode_int8)
    points = torch.zeros(32, 1, dtype=torch.int8)
    change(folder, lambda tensors: tensors.update({f"{O_PROJ}.weight_zero_point": points}))
    assert_means_its_floats(folder)
    change(folder, lambda tensors: tensors[f"{O_PROJ}.weight_zero_point"].fill_(3))
    assert f"{O_PROJ}.weight_zero_point" in refusal(folder)
