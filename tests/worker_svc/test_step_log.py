"""worker_svc.step_log: what is written is what is read, and what is no log is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import SettingsError
from worker_svc.batch import Work
from worker_svc.step_log import StepLog, read_steps

STEPS = [(Work(64, 2048.5, 3, 1200, 1), 0.0123456), (Work(num_sequences=2, num_context_tokens=77), 0.002)]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path / "new"), "w0")
    for work, seconds in STEPS:
        log.add(work, seconds)
    log.close()

    assert list(read_steps(tmp_path / "new" / "w0.csv")) == STEPS


def test_the_half_line_of_a_worker_that_was_killed_is_left_out(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path), "w0")
    log.add(*STEPS[0])
    log.close()
    path = tmp_path / "w0.csv"
    path.write_text(path.read_text() + "64,20")

    assert list(read_steps(path)) == STEPS[:1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a,b\n", "is no step log"), ("", "is no step log"), (None, "cannot be read")],
    ids=["other columns", "empty", "missing"],
)
def test_what_is_no_step_log_is_named(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "x.csv"
    if text is not None:
        path.write_text(text)

    with pytest.raises(SettingsError, match=f"x.csv.*{complaint}"):
        list(read_steps(path))


def test_a_line_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    StepLog(str(tmp_path), "w0").close()
    path = tmp_path / "w0.csv"
    path.write_text(path.read_text() + "one,2,3,4,5,6\n1,2,3,4,5,6\n")

    with pytest.raises(SettingsError, match=r"w0\.csv, line 2 is no step"):
        list(read_steps(path))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SettingsError, match="step_log: .*file"):
        StepLog(str(tmp_path / "file"), "w0")
