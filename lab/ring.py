"""A whole mesh as users start it, for a benchmark: `weft up` in a process, on a free port. Other servers likewise."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ring:
    """A running mesh."""

    port: int
    pid: int
    started_at: float  # perf_counter seconds, before the process was started

    def cpu_s(self, module: str) -> float:
        """CPU seconds that the service `module` (one process or several) has used so far."""
        ticks = os.sysconf("SC_CLK_TCK")
        total = 0
        for pid in self.pids(module):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / ticks

    def pids(self, module: str) -> list[int]:
        """Processes of the service `module`."""
        return [pid for pid in _children(self.pid) if module in _command(pid).split("\0")]


@contextmanager
def running(*flags: str, wait_s: float = 120.0) -> Iterator[Ring]:
    """Run `weft up` with these flags until the block ends. Raises RuntimeError with its output if it fails to start."""
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}
    with tempfile.TemporaryDirectory(prefix="weft-lab-") as folder:
        command = [str(Path(sys.executable).parent / "weft"), "up", "--port", str(port), "--data-path", folder, *flags]
        started_at = time.perf_counter()
        with server(command, environ, f"http://127.0.0.1:{port}/ready", wait_s) as pid:
            yield Ring(port, pid, started_at)


@contextmanager
def server(command: list[str], environ: dict[str, str], ready_url: str, wait_s: float) -> Iterator[int]:
    """Run a server, whose process id this gives, from when `ready_url` answers until the block ends.

    Raises:
        RuntimeError: it did not get ready; with what it wrote.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        try:
            if not _is_ready(process, ready_url, time.perf_counter() + wait_s):
                output.seek(0)
                raise RuntimeError(f"{' '.join(command)} did not get ready:\n{output.read()}")
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_idle(limit_s: float = 10.0) -> None:
    """Wait until the machine computes next to nothing: what a server does after its turn must not slow the next."""
    deadline = time.perf_counter() + limit_s
    before = _busy_s()
    while time.perf_counter() < deadline:
        time.sleep(0.25)
        after = _busy_s()
        if after - before <= 0.025:
            return
        before = after


def _busy_s() -> float:
    """Seconds that all cores together have computed since the machine started."""
    user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _is_ready(process: subprocess.Popen[bytes], url: str, deadline: float) -> bool:
    while process.poll() is None and time.perf_counter() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    return False


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(entry.name), *_children(int(entry.name))]
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
