"""What the supervisor knows of one process that it keeps alive, and the words for what happens to it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from weft.errors import WeftError
from weft.messages import Role

FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 10.0

ChildState = Literal["starting", "ready", "draining", "waiting", "ended"]


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to keep alive; `name` is its instance on the bus. Without a role it is the NATS server."""

    name: str
    role: Role | None
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)
    sockets: tuple[socket.socket, ...] = ()  # that each of its lives inherits, under their descriptors here


class ChildProcess(Protocol):
    """A process of ours, however it was started."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""

    async def wait(self) -> int:
        """Until it has ended: its `returncode`."""


@dataclass(slots=True)
class Child:
    """What the supervisor knows of one process. Times are monotonic seconds."""

    spec: ChildSpec
    state: ChildState = "starting"
    since: float = 0.0  # when this life began
    ready_at: float = 0.0  # when it first was ready in this life
    last_beat: float = 0.0
    epoch: int | None = None  # of this life, from its heartbeats
    past_epoch: int = 0
    was_ready: bool = False  # in any life
    is_leaving: bool = False  # told to drain and not to come back
    failures: int = 0  # deaths since it last was stable
    loaded: float = 0.0  # share of the weights that a worker has loaded
    process: ChildProcess | None = None
    log_offset: int = 0  # where this life's part of the log begins


@dataclass(frozen=True, slots=True)
class News:
    """One sentence about a child."""

    child: str
    text: str
    kind: Literal["ready", "trouble"]


class StartFailed(WeftError):
    """A child died again and again before it was ever ready; the message says which and how."""


def restart_delay(failures: int) -> float:
    """Seconds to wait before a child's next life after so many deaths in a row."""
    return float(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** max(0, failures - 1)))


def orders(spec: ChildSpec, log_path: Path, environ: Mapping[str, str]) -> bytes:
    """What a process that waits is told, to become this child: see `worker_svc.orders`."""
    return json.dumps({"environ": {**spec.environ, **environ}, "log": str(log_path)}).encode() + b"\n"


def last_words(log_path: Path, offset: int = 0) -> str:
    """What a process wrote last into its log, from `offset` on."""
    with log_path.open("rb") as source:
        source.seek(max(offset, source.seek(0, os.SEEK_END) - 65_536))
        lines = source.read().decode(errors="replace").split("\n")
    words = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    # The service's own `program: ` is ours to say.
    program, colon, rest = words.partition(": ")
    return rest if colon and " " not in program else words


def describe_status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status}, {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
