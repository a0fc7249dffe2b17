"""Log files that do not grow for ever."""

from __future__ import annotations

from pathlib import Path

from weft.data_folder import MAX_LOG_BYTES, DataFolder


def make_folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path)
    folder.logs.mkdir()
    return folder


def test_log_that_is_too_long_begins_anew_and_is_kept_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with folder.log("nats").open("ab") as log:
        log.truncate(MAX_LOG_BYTES + 1)
        folder.trim_log("nats")
        log.write(b"goes on")
    assert folder.log("nats").read_bytes() == b"goes on"
    assert (folder.logs / "nats.log.1").stat().st_size == MAX_LOG_BYTES + 1


def test_log_that_is_short_or_missing_is_left_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    folder.log("nats").write_bytes(b"short")
    for name in ("nats", "cache-0"):
        folder.trim_log(name)
    assert [path.name for path in folder.logs.iterdir()] == ["nats.log"]
    assert folder.log("nats").read_bytes() == b"short"
