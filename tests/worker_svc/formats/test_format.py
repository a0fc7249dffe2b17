"""Which format a folder has, and which linears a pattern names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from weft import model_folder
from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from weft.settings import ModelSettings
from worker_svc.formats import FORMATS, read_format
from worker_svc.formats.format import FLOATS, is_named


def folder(section: Any) -> ModelFolder:
    read = model_folder.read(ModelSettings(model="tales-1m"))
    return dataclasses.replace(read, config={**read.config, "quantization_config": section})


@pytest.mark.parametrize("section", [None, {}])
def test_without_a_quantization_config_weights_are_floats(section: Any) -> None:
    assert read_format(folder(section)) is FLOATS


@pytest.mark.parametrize("method", ["exl2", None, 4, []])
def test_unknown_method_is_refused_with_those_that_are_known(method: Any) -> None:
    with pytest.raises(SettingsError) as refused:
        read_format(folder({"quant_method": method, "bits": 4}))
    assert str(refused.value) == (
        f"tales-1m/config.json: quantization_config: quant_method {method!r} is not known; known are "
        f"{', '.join(FORMATS)}"
    )


def test_section_of_another_type_is_refused() -> None:
    with pytest.raises(SettingsError, match="quantization_config is 'gptq', no object"):
        read_format(folder("gptq"))


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.1.mlp.gate", "gate", True),
        ("model.layers.1.mlp.gate_proj", "gate", False),
        ("model.layers.1.mlp.gate_proj", "mlp", True),
        ("model.layers.11.mlp.gate_proj", "model.layers.1", False),
        ("model.layers.1.mlp.gate_proj", "model.layers.1.", True),
        ("lm_head", "lm_head", True),
    ],
)
def test_pattern_names_whole_parts(name: str, pattern: str, expected: bool) -> None:
    assert is_named(name, ["other", pattern]) is expected
