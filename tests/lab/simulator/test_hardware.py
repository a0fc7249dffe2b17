from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from lab.simulator.fit import step_s
from lab.simulator.hardware import HARDWARE, find
from weft.errors import SettingsError
from worker_svc.batch import Work

A100 = HARDWARE["a100"]


def test_hardware_is_found_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(replace(A100, what="mine")))
    assert find("a100") is A100
    assert find(str(path)) == replace(A100, what="mine")


@pytest.mark.parametrize("name", HARDWARE)
def test_times_are_of_the_order_that_gpus_have(name: str) -> None:
    cost = HARDWARE[name].cost
    assert 0.005 < step_s(cost, Work(num_sequences=1, num_context_tokens=1000)) < 0.05
    assert 0.01 < cost.prefill_s(1000) < 0.2


def test_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(SettingsError, match=f"hardware: {path} makes no sense: .*`what`"):
        find(str(path))


def test_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(SettingsError, match="no hardware 'b900' and no such file; there are a100, h100, a800"):
        find("b900")
