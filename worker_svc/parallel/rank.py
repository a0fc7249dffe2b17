"""`python -m worker_svc.parallel.rank SOCKET`: a rank other than 0, which does what rank 0 says, and ends with it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from queue import SimpleQueue
from typing import Final, assert_never

import torch

from weft import model_folder
from weft.errors import SettingsError
from weft.exit_status import BAD_SETTINGS, FAILED
from weft.telemetry import start_logging
from worker_svc.parallel.group import Group
from worker_svc.parallel.pipe import (
    Allocate,
    Blocks,
    Command,
    Connect,
    CopyBlock,
    Forward,
    Load,
    Loaded,
    Pipe,
    ReadBlocks,
    Ready,
    Refused,
    Stop,
    WriteBlocks,
)
from worker_svc.runner import Runner, load_runner

log = logging.getLogger(__name__)

# The worker's process is told to drain, and needs this one until it has.
_IGNORED: Final = (signal.SIGTERM, signal.SIGINT)


class Follower:
    """One rank's share of a model, and the commands for it."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._commands: SimpleQueue[Command] = SimpleQueue()
        threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def run(self) -> int:
        """Load, then obey until told to stop; returns the exit status."""
        load = self._commands.get()
        assert isinstance(load, Load)
        start_logging(load.log_level, f"{load.instance}.{load.rank}")
        group = Group(load.rank, load.size)
        try:
            runner = self._make_runner(load, group)
        except SettingsError as error:
            self._pipe.send(Refused(error.message))
            return BAD_SETTINGS
        self._pipe.send(Ready())
        try:
            self._obey(runner, group, load.meeting_point)
        except Exception:
            log.exception("rank failed")
            return FAILED
        return 0

    def _make_runner(self, load: Load, group: Group) -> Runner:
        return load_runner(
            model_folder.read(load.model),
            load.options,
            group=group,
            agree=self._agree,
        )

    def _agree(self, num_blocks: int) -> int:
        self._pipe.send(Loaded(num_blocks))
        command = self._commands.get()
        assert isinstance(command, Allocate)
        return command.num_blocks

    def _obey(self, runner: Runner, group: Group, meeting_point: str) -> None:
        while True:
            match command := self._commands.get():
                case Forward(step, count):
                    tokens = torch.empty(count, dtype=torch.int64, device=runner.device)
                    runner.forward(step, group.spread(tokens) if count else None)
                case CopyBlock(source, target):
                    runner.copy_block(source, target)
                case ReadBlocks(block_ids):
                    self._pipe.send(Blocks(runner.read_blocks(block_ids)))
                case WriteBlocks(block_ids, blocks):
                    runner.write_blocks(block_ids, blocks)
                case Connect():
                    group.connect(runner.device, meeting_point)
                case Stop():
                    group.close()
                    return
                case Load() | Allocate():
                    raise AssertionError(f"{type(command).__name__} comes once, before all others")
                case _:
                    assert_never(command)

    def _listen(self) -> None:
        """In a thread of its own, since the other one may be waiting for a rank that is gone."""
        while (command := self._pipe.receive()) is not None:
            self._commands.put(command)
            if isinstance(command, Stop):
                return
        os._exit(FAILED)


def main() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # Whatever torch has to say to standard output belongs into the log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])), Command)
    status = Follower(pipe).run()
    # Nothing is left to tidy up, and libraries that try to may wait for ranks that are gone.
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    main()
