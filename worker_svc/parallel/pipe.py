"""What rank 0 and each other rank say to each other, over a socket that only they have.

Rank 0 has every step computed by all: it sends the step as a command and then computes its own share. A pipe ends when
the other side does, however it ends; so nobody waits for a rank that is gone, nor for a command that never comes.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from weft.settings import ModelSettings
from worker_svc.model_options import ModelOptions
from worker_svc.step_input import StepInput

_LENGTH_BYTES = 8


class Load(msgspec.Struct, tag=True):
    """The first command: which share of which model, as `Runner` takes it."""

    rank: int
    size: int
    model: ModelSettings
    options: ModelOptions
    meeting_point: str  # file for `Group.connect`
    instance: str  # who logs
    log_level: str


class Allocate(msgspec.Struct, tag=True):
    """Make a cache of so many blocks; answered by `Ready`."""

    num_blocks: int


class Connect(msgspec.Struct, tag=True):
    """All ranks are ready: meet them."""


class Forward(msgspec.Struct, tag=True):
    """Compute a step, after taking `num_last_tokens` tokens from rank 0 for what is pending in it."""

    step: StepInput
    num_last_tokens: int


class CopyBlock(msgspec.Struct, tag=True):
    source: int
    target: int


class ReadBlocks(msgspec.Struct, tag=True):
    """Answered by `Blocks`."""

    block_ids: list[int]


class WriteBlocks(msgspec.Struct, tag=True):
    block_ids: list[int]
    blocks: list[bytes]


class Stop(msgspec.Struct, tag=True):
    """End."""


class Loaded(msgspec.Struct, tag=True):
    """The weights are there, and memory for so many blocks."""

    num_blocks: int


class Ready(msgspec.Struct, tag=True):
    """Nothing is missing but the connection."""


class Refused(msgspec.Struct, tag=True):
    """Settings or folder cannot be served; the rank ends."""

    message: str


class Blocks(msgspec.Struct, tag=True):
    blocks: list[bytes]


Command = Load | Allocate | Connect | Forward | CopyBlock | ReadBlocks | WriteBlocks | Stop
Reply = Loaded | Ready | Refused | Blocks


class Pipe:
    """One end. One thread sends, and one receives."""

    def __init__(self, end: socket.socket, expected: Any) -> None:
        """`expected`: the union of what may come."""
        self._socket = end
        self._file = end.makefile("rb")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(expected)

    def send(self, message: Command | Reply) -> None:
        """Raises OSError if the other side is gone."""
        data = self._encoder.encode(message)
        self._socket.sendall(len(data).to_bytes(_LENGTH_BYTES, "little"))
        self._socket.sendall(data)

    def receive(self) -> Any:
        """The next message; None if the other side is gone."""
        try:
            head = self._file.read(_LENGTH_BYTES)
            data = self._file.read(int.from_bytes(head, "little"))
        except OSError:
            return None
        return self._decoder.decode(data) if data else None

    def hang_up(self) -> None:
        """End it for both sides; any thread."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Not while another thread receives; that of the other side gets None."""
        self._file.close()
        self._socket.close()
