"""A real `weft up` for a test: its own data folder, its own port, ready when it says so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import children_of
from weft import launch

WEFT = Path(sys.executable).parent / "weft"
READY_S = 60.0


def environ(folder: Path) -> dict[str, str]:
    """The environment of a user who has set nothing but the data folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}
    return clean | {"WEFT_DATA_PATH": str(folder)}


@dataclass
class Up:
    """A running `weft up`. `lines` grows as it prints."""

    process: subprocess.Popen[str]
    folder: Path
    lines: list[str] = field(default_factory=list)
    url: str = ""
    changed: threading.Condition = field(default_factory=threading.Condition)
    ended: bool = False
    reader: threading.Thread | None = None

    def read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                with self.changed:
                    self.lines.append(line.rstrip("\n"))
                    self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def wait_for(self, pattern: str, *, since: int = 0, timeout_s: float = READY_S) -> re.Match[str]:
        """The first line from number `since` on that matches. Raises TimeoutError with all lines."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines[since:] if (match := re.search(pattern, line))), None)

        with self.changed:
            if self.changed.wait_for(lambda: found() or self.ended, timeout_s) and (match := found()):
                return match
        raise TimeoutError(f"no {pattern!r} in:\n" + "\n".join(self.lines))

    def pid_of(self, module: str) -> int:
        """The process id of a child, by its module (`worker_svc`) or program (`nats-server`)."""
        return next(pid for pid, line in children_of(self.process.pid).items() if module in line)

    def command(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Another weft command, run to its end against this one."""
        return subprocess.run(
            [WEFT, *argv],
            env=environ(self.folder),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def interrupt(self) -> int:
        """Ctrl-C, and the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)

    def end(self) -> int:
        """Kill it if it still runs, and let go of it; the exit status."""
        if self.process.poll() is None:
            self.process.kill()
        status = self.process.wait()
        assert self.reader is not None and self.process.stdout is not None
        self.reader.join()
        self.process.stdout.close()
        return status


def start(folder: Path, *argv: str) -> Up:
    """Start without waiting. Whoever calls this calls `end`."""
    # Like the supervisor's own children, it ends when whoever started it does: a killed test leaves nothing behind.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), WEFT, "up", "--port", "0", *argv],
        env=environ(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    up = Up(process, folder)
    up.reader = threading.Thread(target=up.read, daemon=True)
    up.reader.start()
    return up


@contextmanager
def running(folder: Path, *argv: str) -> Iterator[Up]:
    """A `weft up` that is ready; ended at the end, if it still runs."""
    up = start(folder, *argv)
    try:
        up.url = up.wait_for(r"^Weft serves \S+ at (\S+)")[1]
        yield up
    finally:
        up.end()
