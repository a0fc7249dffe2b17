"""lab.calibrate: it measures a real engine, and what it writes is what the simulator reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.calibrate import Bench, calibrate, judge, main
from lab.simulator.fit import Step, step_s
from lab.simulator.hardware import find
from scheduler_svc.cost_model import CostModel
from weft.model_folder import read
from weft.settings import WorkerSettings, load
from worker_svc.batch import Work
from worker_svc.step_log import StepLog
from worker_svc.torch_engine import load_engine

SMALL = ("--model", "tales-1m", "--max-num-seqs", "2", "--max-num-batched-tokens", "64")


def test_error_is_a_share_of_the_measured_time() -> None:
    cost = CostModel(overhead_s=0.01, token_s=0.001, attention_s=1e-6, context_s=1e-5, sequence_s=1e-3, chunk_s=0.002)
    work = Work(10, 100.0, 2, 50, 1)

    assert Step(work, step_s(cost, work)).error(cost) == pytest.approx(0.0)
    assert Step(work, step_s(cost, work) / 1.25).error(cost) == pytest.approx(0.25)


def test_a_live_engine_is_measured_and_half_of_its_steps_are_held_out() -> None:
    settings = load(WorkerSettings, list(SMALL), {}, prog="test")
    folder = read(settings.model)
    bench = Bench(load_engine(folder, settings), folder)

    cells = bench.cells(settings)
    steps = bench.steps(cells)

    for cell, step in zip(cells, steps, strict=True):
        assert step.work.num_chunks == cell.num_prompts and step.work.num_sequences == cell.num_sequences
        assert step.work.num_new == cell.num_prompts * cell.num_new
        assert step.work.num_seen == cell.num_prompts * cell.num_new * (cell.num_cached + cell.num_new / 2)
        assert step.work.num_context_tokens >= cell.num_sequences * (cell.context + 1)
    assert any(cell.num_prompts and cell.num_sequences for cell in cells)
    cost, _, errors = judge(steps)
    assert len(errors) == len(steps) // 2 and step_s(cost, Work(64, 64 * 32, num_chunks=1)) > 0


def test_what_a_live_worker_wrote_down_is_fitted_and_its_spread_is_kept(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path), "w0")
    for number in range(400):
        # Every sixth step takes half as long again as the others.
        log.add(Work(num_sequences=1 + number % 7, num_context_tokens=100 * (number % 5)), 0.02 * (1 + number % 6 // 4))
    log.close()

    found = calibrate(load(WorkerSettings, list(SMALL), {}, prog="test"), [tmp_path / "w0.csv"]).hardware

    assert step_s(found.cost, Work(num_sequences=4, num_context_tokens=200)) == pytest.approx(0.024, rel=0.15)
    assert len(found.spread) == 101 and found.spread[-1] / found.spread[0] == pytest.approx(2, rel=0.2)


def test_the_file_it_writes_is_hardware_that_the_simulator_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "measured.json"

    assert main([*SMALL, "--out", str(path)]) == 0

    out = capsys.readouterr().out
    assert "held-out error" in out and f"--hardware {path}" in out
    assert step_s(find(str(path)).cost, Work(1, 1, 1, 1)) > 0


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "none" / "file.json")]) == 2

    assert "file.json" in capsys.readouterr().err


def test_help_says_what_is_timed_and_what_the_file_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Time the steps of an engine" in out and "Run one replica" not in out
    for flag in ("--out FILE", "--steps FILE", "--step-log FOLDER", "--hardware ", "--cost-file ", "--max-num-seqs N"):
        assert flag in out
