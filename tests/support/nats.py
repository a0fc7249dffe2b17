"""A real NATS server for a test, on a port of its own, ready when its own log says so."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVER = Path(sys.executable).parent / "nats-server"


@dataclass
class NatsServer:
    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"


def start(config: str | None = None, port: int = -1, *, folder: Path) -> NatsServer:
    """Start a server. Raises RuntimeError with its log if it does not come up."""
    path = folder / "nats.conf"
    path.write_text("max_payload: 8MB\n" if config is None else config)
    process = subprocess.Popen(
        [SERVER, "-a", "127.0.0.1", "-p", str(port), "-c", path], stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"Listening for client connections on .*:(\d+)", line):
            port = int(match[1])
        if "Server is ready" in line:
            # Keep reading, or a full pipe stops the server.
            _keep_reading(process)
            return NatsServer(process, port)
    raise RuntimeError("nats-server did not start:\n" + "".join(lines))


def _keep_reading(process: subprocess.Popen[str]) -> None:
    def read() -> None:
        with process.stderr as lines:  # type: ignore[union-attr]  # opened as a pipe
            for _ in lines:
                pass

    threading.Thread(target=read, daemon=True).start()


def stop(server: NatsServer) -> None:
    """Kill a server, stopped or not, and wait for its end."""
    server.process.kill()
    server.process.wait()


@contextmanager
def running(folder: Path, config: str | None = None) -> Iterator[NatsServer]:
    server = start(config, folder=folder)
    try:
        yield server
    finally:
        stop(server)
