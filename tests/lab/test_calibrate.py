"""lab.calibrate: it measures a real engine, and what it writes is what the simulator reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.calibrate import calibrate, error_of, main
from lab.simulator.fit import Step
from lab.simulator.hardware import find
from scheduler_svc.cost_model import CostModel
from weft.settings import WorkerSettings, load

SMALL = ("--model", "tales-1m", "--max-num-seqs", "2", "--max-num-batched-tokens", "64")


def test_error_is_a_share_of_the_measured_time() -> None:
    cost = CostModel(overhead_s=0.01, token_s=0.001, attention_s=1e-6, context_s=1e-5, sequence_s=1e-3)
    predicted = cost.step_s(10, 100.0, 2, 50)

    assert error_of(cost, Step(10, 100.0, 2, 50, predicted)) == pytest.approx(0.0)
    assert error_of(cost, Step(10, 100.0, 2, 50, predicted / 1.25)) == pytest.approx(0.25)


def test_a_live_engine_is_measured_and_half_of_its_steps_are_held_out() -> None:
    found = calibrate(load(WorkerSettings, list(SMALL), {}, prog="test"))

    assert 0 <= found.num_fitted - len(found.errors) <= 1 and found.errors
    assert found.hardware.cost.step_s(64, 64 * 32, 2, 100) > 0
    assert found.hardware.kv_tokens % 16 == 0


def test_the_file_it_writes_is_hardware_that_the_simulator_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "measured.json"

    assert main([*SMALL, "--out", str(path)]) == 0

    assert "held-out error" in capsys.readouterr().out
    assert find(str(path)).cost.step_s(1, 1, 1, 1) > 0


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "none" / "file.json")]) == 2

    assert "file.json" in capsys.readouterr().err
