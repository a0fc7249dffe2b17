"""Presets set what there is, other settings win over them, and what is written of them is what they set."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from scheduler_svc.policies import CHOICES
from weft import data_folder, model_folder, up
from weft.errors import SettingsError
from weft.messages import WorkerRole
from weft.presets import PRESETS, Preset
from weft.settings import SchedulerSettings, UpSettings, WorkerSettings, declared, load
from worker_svc.batch import POLICIES, RESERVATIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
WRITTEN = (ROOT / "lab/PRESETS.md").read_text("utf-8")


def plan(tmp_path: Path, *argv: str) -> up.Plan:
    settings = load(UpSettings, argv, {})
    return up.make_plan(settings, model_folder.read(settings.worker.model), data_folder.at(str(tmp_path)), {})


def roles_in(made: up.Plan) -> list[str]:
    return [spec.environ["WEFT_ROLE"] for spec in made.specs if spec.role == "worker"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_preset_names_what_the_registries_have(preset: Preset) -> None:
    assert all(name in CHOICES[family] for family, name in preset.policies.items())
    assert set(preset.policies) == set(CHOICES)
    assert preset.batching in POLICIES and preset.reserve in RESERVATIONS
    assert set(preset.roles) <= set(typing.get_args(WorkerRole))


@pytest.mark.parametrize("name", PRESETS)
def test_services_take_every_setting_of_a_preset(name: str) -> None:
    scheduler, worker = (load(cls, [], {"WEFT_PRESET": name}) for cls in (SchedulerSettings, WorkerSettings))
    for setting, value in PRESETS[name].settings.items():
        owner = scheduler if hasattr(scheduler, setting) else worker
        assert getattr(owner, setting) == value, setting


def test_weft_is_the_default() -> None:
    for cls in (SchedulerSettings, WorkerSettings):
        assert load(cls, [], {}) == load(cls, ["--preset", "weft"], {})


def test_settings_beside_a_preset_win_over_it() -> None:
    loaded = load(UpSettings, ["--preset", "mooncake", "--route", "random"], {"WEFT_MAX_NUM_SEQS": "7"})
    assert (loaded.scheduler.route, loaded.scheduler.admit) == ("random", "predicted_reject")
    assert (loaded.worker.max_num_seqs, loaded.worker.kv_offload) == (7, "always")
    flag = load(UpSettings, ["--preset", "sglang"], {"WEFT_PRESET": "vllm"})
    assert flag.scheduler.order == "prefix_first"


def test_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError) as caught:
        load(UpSettings, ["--preset", "tgi"], {})
    assert caught.value.message == "--preset: 'tgi' is none of vllm, sglang, mooncake, deepflow, weft"


def test_worker_alone_does_both() -> None:
    assert PRESETS["mooncake"].roles_of(3) == ("prefill", "decode", "prefill")
    assert PRESETS["mooncake"].roles_of(1) == ("both",)
    assert PRESETS["deepflow"].roles_of(3) == ("both",) * 3
    assert PRESETS["deepflow"].roles_of(4) == ("both", "both", "prefill", "decode")
    assert PRESETS["vllm"].roles_of(0) == ()


def test_plan_divides_workers_as_the_preset_says(tmp_path: Path) -> None:
    made = plan(tmp_path, "--preset", "mooncake", "--workers", "3", "--order", "srpt")
    assert roles_in(made) == ["prefill", "decode", "prefill"]
    assert made.policies == (
        "Preset mooncake: admit=predicted_reject order=srpt route=min_ttft predict=mean batching=chunked; "
        "workers: 2 prefill, 1 decode"
    )


def test_plan_says_when_workers_are_too_few_to_divide(tmp_path: Path) -> None:
    made = plan(tmp_path, "--preset", "mooncake")
    assert roles_in(made) == ["both"]
    assert made.policies.endswith("; all workers prefill and decode, since apart takes --workers 2 or more")


def test_plan_says_how_many_workers_scaling_may_start_and_what_is_reserved(tmp_path: Path) -> None:
    made = plan(tmp_path, "--scale", "queue", "--max-workers", "3", "--reserve", "reserve_max")
    assert made.policies.endswith("batching=chunked reserve=reserve_max; 0 to 3 workers, by scale=queue")


def test_a_role_that_is_given_is_that_of_all_workers(tmp_path: Path) -> None:
    made = plan(tmp_path, "--preset", "mooncake", "--workers", "2", "--role", "both")
    assert roles_in(made) == ["both", "both"]
    assert made.policies.endswith("batching=chunked")


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_sets_is_written_down(name: str) -> None:
    preset = PRESETS[name]
    section = WRITTEN.split(f"\n## {name}\n")[1]
    told = dict(re.findall(r"`([a-z_]+)=([^`]*)`", section.split("\n\n")[0]))
    default = PRESETS["weft"].settings
    sets = {item: str(value) for item, value in preset.settings.items() if value != default[item]}
    assert told == sets | ({"roles": ",".join(preset.roles)} if len(preset.roles) > 1 else {})


def test_readme_names_the_policies_there_are() -> None:
    families = {family: set(names) for family, names in CHOICES.items()}
    families |= {"batching": set(POLICIES), "reserve": set(RESERVATIONS), "preset": set(PRESETS)}
    scale = next(item for item in declared(SchedulerSettings) if item.name == "scale")
    families["scale"] = set(scale.metadata["choices"])
    told: dict[str, set[str]] = {}
    family = ""
    for line in README.split("\n## Policies\n")[1].split("\n## ")[0].splitlines():
        if row := re.match(r"\| (?:`([a-z]+)` )?\| ((?:`[a-z_0-9]+`(?:, )?)+) \|", line):
            family = row[1] or family
            told.setdefault(family, set()).update(re.findall(r"[a-z_0-9]+", row[2]))
    assert told == families


def test_readme_says_what_the_settings_defaults_are() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `--admit`"))
    assert re.findall(r"`([a-z_]+)`", row) == list(PRESETS["weft"].policies.values())
