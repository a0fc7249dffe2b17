"""The folder of one `weft up`: log files, what other commands need to reach it, and the cache's disk tier.

`logs/<instance>.log` is what each process says; that of the run before is kept as `.log.1`. `run/` holds NATS's
configuration and `weft.json`, from which `weft top` and `weft drain` know where the bus is; `kv/` holds KV blocks.
Both are for their owner's eyes alone: passwords in the one, what was asked and answered in the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weft.errors import SettingsError

DEFAULT: Final = "~/.cache/weft"
MAX_LOG_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class RunFile:
    """How to reach a running `weft up`."""

    pid: int
    url: str
    nats_url: str
    nats_user: str
    nats_password: str


@dataclass(frozen=True, slots=True)
class DataFolder:
    root: Path

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def kv(self) -> Path:
        return self.root / "kv"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def trim_log(self, name: str) -> None:
        """Begin it anew if it has become too long; what it said until now is kept as `.log.1`."""
        path = self.log(name)
        # Who writes it goes on in the same file, at its new end: it was opened for appending.
        with contextlib.suppress(OSError):
            if path.stat().st_size > MAX_LOG_BYTES:
                shutil.copyfile(path, path.with_suffix(".log.1"))
                os.truncate(path, 0)

    @property
    def run_file(self) -> Path:
        return self.run / "weft.json"

    def write_private(self, path: Path, text: str) -> None:
        """Write a file that only its owner may read."""
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
            target.write(text)

    def clear_run(self) -> None:
        """Remove what an earlier run left for others to find, passwords included. The lock stays."""
        for path in (self.run_file, self.run / "nats.conf", *self.run.glob("*.ports")):
            path.unlink(missing_ok=True)

    def write_run_file(self, run_file: RunFile) -> None:
        self.write_private(self.run_file, json.dumps(dataclasses.asdict(run_file)))


def at(path: str) -> DataFolder:
    return DataFolder(Path(path or DEFAULT).expanduser())


def take(path: str) -> tuple[DataFolder, int]:
    """Make the folder and lock it for this process; the lock ends with the file descriptor given, or the process.

    Raises:
        SettingsError: it cannot be made or written, or another `weft up` has it.
    """
    folder = at(path)
    try:
        for part in (folder.logs, folder.kv, folder.run):
            part.mkdir(parents=True, exist_ok=True)
        for private in (folder.run, folder.kv):
            private.chmod(0o700)
        lock = os.open(folder.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"the data folder {folder.root} cannot be used: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        running = read_run_file(folder)
        who = f" (process {running.pid}, {running.url})" if running else ""
        raise SettingsError(
            f"another `weft up` runs in {folder.root}{who}: stop it, or give this one a folder with --data-path"
        ) from None
    folder.clear_run()
    for old in folder.logs.glob("*.log"):
        old.replace(old.with_suffix(".log.1"))
    return folder, lock


def read_run_file(folder: DataFolder) -> RunFile | None:
    """What the `weft up` that runs in the folder wrote; None if none runs."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        run_file = RunFile(**json.loads(folder.run_file.read_text()))
        os.kill(run_file.pid, 0)
        return run_file
    return None
