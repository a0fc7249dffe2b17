"""Made-up weights: finite, of the scale of real ones, the same in every worker of one shape, and without any file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import ARCHITECTURES, make_checkpoint
from tests.support.steps import OPTIONS, Driver
from weft import model_folder
from weft.errors import SettingsError
from weft.settings import ModelSettings
from worker_svc.dummy import STD, DummyWeights
from worker_svc.formats import read_format
from worker_svc.formats.format import FLOATS
from worker_svc.quantization import Fp8Weight, Int4Weight, Int8Weight, dequantize, in_float
from worker_svc.runner import load_runner

TOKENS = [(7 * i + 3) % 128 for i in range(45)]
CPU = torch.device("cpu")
GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}}


def shape_only(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A folder with a config.json and nothing else."""
    make_checkpoint(folder, family, **overrides)
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    return folder


def dummy(folder: Path) -> model_folder.ModelFolder:
    return model_folder.read(ModelSettings(model=str(folder), load_format="dummy"))


def greedy(folder: Path, **settings: Any) -> torch.Tensor:
    runner = load_runner(dummy(folder), dataclasses.replace(OPTIONS, **settings))
    (logits,) = Driver(runner, [TOKENS]).play([{0: 45}])
    assert logits.isfinite().all()
    return logits.argmax(-1)


def test_two_workers_of_one_shape_agree(tmp_path: Path) -> None:
    one, other = (shape_only(tmp_path / name) for name in ("one", "other"))
    assert model_folder.digest(dummy(one)) == model_folder.digest(dummy(other))
    tokens = greedy(one)
    assert torch.equal(tokens, greedy(other))
    assert len(set(tokens.tolist())) > 5


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_every_family_computes_finite_logits(tmp_path: Path, family: str, quantize: str) -> None:
    greedy(shape_only(tmp_path, family), quantize=quantize)


def test_files_are_not_read_and_their_content_has_another_digest(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    real = model_folder.digest(model_folder.read(ModelSettings(model=str(folder))))
    (folder / "model.safetensors").write_bytes(b"no safetensors file")
    assert model_folder.digest(dummy(folder)) != real
    greedy(folder)


def test_digest_tells_shapes_apart(tmp_path: Path) -> None:
    one, other = shape_only(tmp_path / "one"), shape_only(tmp_path / "other", intermediate_size=64)
    assert model_folder.digest(dummy(one)) != model_folder.digest(dummy(other))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 16},
        {"quant_method": "awq", "bits": 4, "group_size": 16},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": GROUPS},
    ],
    ids=lambda config: str(config["quant_method"]),
)
def test_quantized_shape_gets_quantized_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = dummy(shape_only(tmp_path, quantization_config=config))
    weights = DummyWeights(read_format(folder), CPU, torch.float32)
    weight = weights.weight("model.layers.0.mlp.up_proj", (48, 32))
    if "weight_block_size" in config:
        assert isinstance(weight, torch.Tensor)
    else:
        assert isinstance(weight, Int4Weight)
        assert weight.scales.shape == (48, 2)
    assert isinstance(weights.weight("lm_head", (128, 32)), torch.Tensor)
    greedy(tmp_path)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantized_weights_are_made_without_a_float_and_of_the_same_scale(kind: str) -> None:
    weight = DummyWeights(FLOATS, CPU, torch.float32, kind).weight("some.linear", (64, 256))
    assert isinstance(weight, {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}[kind])
    floats = dequantize(weight)
    assert floats.isfinite().all()
    # 16,384 draws: both are off by less than 4 standard errors.
    assert abs(floats.std().item() / STD - 1) < 0.05
    assert abs(floats.mean().item()) < 4 * STD / 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["none", "int8", "int4", "fp8"])
def test_weights_are_made_on_the_device(kind: str) -> None:
    weight = DummyWeights(FLOATS, torch.device("cuda"), torch.bfloat16, kind).weight("some.linear", (64, 256))
    floats = in_float(weight)
    assert floats.is_cuda
    assert floats.isfinite().all()


def test_the_head_has_no_less_than_eight_bits() -> None:
    weights = DummyWeights(FLOATS, CPU, torch.float32, "int4")
    assert isinstance(weights.weight("lm_head", (64, 256)), Int8Weight)


def test_groups_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    folder = shape_only(tmp_path, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    with pytest.raises(SettingsError, match="which AWQ in groups of 128 cannot hold"):
        greedy(folder)


def test_folder_without_weights_is_refused_unless_they_are_made_up(tmp_path: Path) -> None:
    folder = dummy(shape_only(tmp_path))
    model_folder.digest(folder)
    with pytest.raises(SettingsError, match="has no weights"):
        model_folder.digest(dataclasses.replace(folder, is_dummy=False))
