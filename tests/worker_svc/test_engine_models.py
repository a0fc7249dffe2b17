"""Models that engines share: the same weights, KV blocks of their own, and settings that must agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.engine_requests import make_request, make_settings
from tests.support.engine_runs import run
from weft import model_folder
from weft.messages import SamplingParams
from weft.model_folder import ModelFolder
from weft.settings import MeshSettings, ModelSettings, WorkerSettings
from worker_svc.engine_io import Add
from worker_svc.engine_models import EngineModels, load_models
from worker_svc.torch_engine import load_engine, warm_up_models

PROMPT = list(range(3, 40))


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return model_folder.read(ModelSettings(model=str(make_checkpoint(tmp_path))))


def settings(**changes: object) -> WorkerSettings:
    return make_settings(**{"device": "cpu", "threads": 1, "kv_memory": 2**20, **changes})


def greedy(folder: ModelFolder, models: EngineModels | None) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    request = make_request(PROMPT, digest=model_folder.digest(folder), sampling=sampling)
    return run(load_engine(folder, settings(), models=models), [Add(request)]).tokens()


def test_engines_on_shared_models_say_what_one_that_loads_for_itself_says(folder: ModelFolder) -> None:
    alone = greedy(folder, None)
    models = load_models(folder, settings())
    warm_up_models(models)
    assert [greedy(folder, models) for _ in range(2)] == [alone] * 2


def test_workers_may_differ_in_what_is_no_matter_of_the_weights(folder: ModelFolder) -> None:
    models = load_models(folder, settings())
    assert models.are_for(folder, settings(mesh=MeshSettings(instance="worker-1"), role="decode", threads=2))


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"kernels": "torch"}], ids=str)
def test_models_loaded_otherwise_are_not_used(folder: ModelFolder, change: dict[str, str]) -> None:
    assert not load_models(folder, settings()).are_for(folder, settings(**change))


def test_models_of_another_folder_are_not_used(folder: ModelFolder, tmp_path: Path) -> None:
    other = model_folder.read(ModelSettings(model=str(make_checkpoint(tmp_path / "other", num_hidden_layers=3))))
    assert not load_models(folder, settings()).are_for(other, settings())
