"""What a folder's config says of the longest text, and folders that are no model of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft import model_folder
from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from weft.settings import ModelSettings

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}


def read(folder: Path, max_model_len: int = 0, **config: Any) -> ModelFolder:
    values = {"max_position_embeddings": 120, "vocab_size": 10} | config
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return model_folder.read(ModelSettings(model=str(folder), max_model_len=max_model_len))


def test_a_text_may_be_as_long_as_the_model_was_made_for(tmp_path: Path) -> None:
    assert read(tmp_path).max_model_len == 120
    assert read(tmp_path, 50).max_model_len == 50
    with pytest.raises(SettingsError, match="max_model_len 121 is more than the 120 tokens"):
        read(tmp_path, 121)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_makes_texts_longer(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, **{key: YARN}).max_model_len == 400
    with pytest.raises(SettingsError, match="401 is more than the 400 tokens"):
        read(tmp_path, 401, **{key: YARN})


def test_yarn_does_not_make_texts_shorter(tmp_path: Path) -> None:
    assert read(tmp_path, rope_scaling=YARN | {"factor": 1.0}).max_model_len == 120


@pytest.mark.parametrize("scaling", [YARN | {"factor": 1e300}, YARN | {"factor": "4"}, {"rope_type": "yarn"}, [1]])
def test_yarn_that_makes_no_sense_is_left_to_the_worker(tmp_path: Path, scaling: Any) -> None:
    assert read(tmp_path, rope_scaling=scaling).max_model_len == 120


def test_models_of_images_are_refused_in_one_sentence(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}, "vision_config": {"depth": 2}}
    with pytest.raises(SettingsError, match="is a model of images and text, and only models of text alone are served"):
        read(tmp_path, max_position_embeddings=None, **config)
