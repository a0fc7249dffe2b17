"""Rank 0 of a group: a runner whose every step other processes compute along."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from weft import launch
from weft.child import describe_status
from weft.errors import DecodeError, SettingsError, Unavailable
from weft.model_folder import ModelFolder
from weft.settings import ModelSettings, WorkerSettings
from worker_svc.loaded_model import resolve_device
from worker_svc.model_options import ModelOptions
from worker_svc.models import read_spec
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
    Reply,
    Stop,
    WriteBlocks,
)
from worker_svc.parallel.share import BlockShares, share_of
from worker_svc.runner import load_runner
from worker_svc.sampler import Sampler
from worker_svc.step_input import StepInput

if TYPE_CHECKING:
    from worker_svc.device_sampler import DeviceSampler

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Reply)
# What a rank may take to end once it is told to, or has closed its pipe.
END_S: Final = 5.0
# Blocks that are sent at a time: neither side holds more of them twice.
BLOCKS_AT_ONCE: Final = 16


class ParallelRunner:
    """A `Runner` over several devices: this process's and those of the ranks that it starts.

    All of them have the same blocks, each with its share of the heads. The ranks die with the thread that makes this.
    """

    def __init__(
        self,
        folder: ModelFolder,
        settings: WorkerSettings,
        *,
        on_progress: Callable[[float], None] = lambda share: None,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Start the ranks, load and connect.

        Args:
            on_progress: called with the share of this rank's weights loaded so far.
            on_lost: called from another thread if a rank ends that should not; nothing can be computed any more.

        Raises:
            SettingsError: as `Runner`; or the model or the machine cannot be shared out like this.
            Unavailable: a rank ended.
        """
        size = settings.tensor_parallel
        check_devices(resolve_device(settings.device), size)
        spec = read_spec(folder)
        share_of(spec, size)
        self._shares = BlockShares.of(spec, size)
        self._group = Group(0, size)
        self._stack = contextlib.ExitStack()
        try:
            folder_name = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="weft-ranks-"))
            load = first_command(folder, settings, str(Path(folder_name) / "meeting"))
            self.followers = [self._start(load, rank, on_lost) for rank in range(1, size)]
            self._runner = load_runner(
                folder,
                load.options,
                on_progress=on_progress,
                group=self._group,
                agree=self._agree,
            )
            self._connect(load.meeting_point)
        except BaseException:
            self._stack.close()
            raise
        self.device = self._runner.device
        self.layout = self._runner.layout
        self.vocab_size = self._runner.vocab_size
        self.num_blocks = self._runner.num_blocks
        self.max_model_len = self._runner.max_model_len
        self.block_bytes = self._shares.block_bytes(self._runner.block_bytes)

    @torch.inference_mode()
    def forward(self, step: StepInput, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """As `Runner.forward`. Raises Unavailable, or RuntimeError from the middle of the step: a rank is gone."""
        is_spread = bool(step.pending) and last_tokens is not None
        self._tell(Forward(step, len(last_tokens) if is_spread and last_tokens is not None else 0))
        if is_spread and last_tokens is not None:
            self._group.spread(last_tokens)
        return self._runner.forward(step, last_tokens)

    def make_sampler(self) -> Sampler | DeviceSampler:
        """As `Runner.make_sampler`."""
        return self._runner.make_sampler()

    def copy_block(self, source: int, target: int) -> None:
        """As `Runner.copy_block`."""
        self._tell(CopyBlock(source, target))
        self._runner.copy_block(source, target)

    def read_blocks(self, block_ids: list[int]) -> list[bytes]:
        """As `Runner.read_blocks`: the same bytes, whatever the number of ranks."""
        if not self._shares.is_divided:
            return self._runner.read_blocks(block_ids)
        self._tell(ReadBlocks(block_ids))
        mine = self._runner.read_blocks(block_ids)
        others = [follower.expect(Blocks).blocks for follower in self.followers]
        return [self._shares.join(shares) for shares in zip(mine, *others, strict=True)]

    def write_blocks(self, block_ids: list[int], blocks: list[bytes]) -> None:
        """As `Runner.write_blocks`."""
        sizes = {len(block) for block in blocks} - {self.block_bytes}
        if sizes:
            raise DecodeError(f"a KV block of {sizes.pop()} bytes where one has {self.block_bytes}")
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            chosen = block_ids[start : start + BLOCKS_AT_ONCE]
            shares = [self._shares.split(block) for block in blocks[start : start + BLOCKS_AT_ONCE]]
            for rank, follower in enumerate(self.followers, 1):
                follower.tell(WriteBlocks(chosen, [share[rank] for share in shares]))
            self._runner.write_blocks(chosen, [share[0] for share in shares])

    def close(self) -> None:
        """As `ModelRunner.close`."""
        self._stack.close()

    def _start(self, load: Load, rank: int, on_lost: Callable[[Exception], None]) -> Follower:
        follower = Follower(load, rank, on_lost)
        self._stack.callback(follower.close)
        return follower

    def _agree(self, num_blocks: int) -> int:
        num_blocks = min(num_blocks, *(follower.expect(Loaded).num_blocks for follower in self.followers))
        self._tell(Allocate(num_blocks))
        return num_blocks

    def _connect(self, meeting_point: str) -> None:
        # A rank that could not allocate its blocks would be waited for in vain.
        for follower in self.followers:
            follower.expect(Ready)
        self._tell(Connect())
        self._stack.callback(self._group.close)
        self._group.connect(self._runner.device, meeting_point)
        # First of all: a rank leaves the group when all do.
        self._stack.callback(self._stop)

    def _stop(self) -> None:
        for follower in self.followers:
            follower.stop()

    def _tell(self, command: Command) -> None:
        for follower in self.followers:
            follower.tell(command)


class Follower:
    """Another rank, as rank 0 sees it."""

    def __init__(self, load: Load, rank: int, on_lost: Callable[[Exception], None]) -> None:
        self._rank = rank
        self._on_lost = on_lost
        self._replies: SimpleQueue[Reply | None] = SimpleQueue()
        self._is_closing = False
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = _start_process(theirs)
        self._pipe = Pipe(ours, Reply)
        self._listener = threading.Thread(target=self._listen, name=f"rank {rank}", daemon=True)
        self._listener.start()
        load.rank = rank
        self.tell(load)

    def tell(self, command: Command) -> None:
        """Raises Unavailable if the rank is gone."""
        try:
            self._pipe.send(command)
        except OSError as error:
            raise Unavailable(f"rank {self._rank} of the worker is gone") from error

    def expect(self, kind: type[R]) -> R:
        """The rank's next answer.

        Raises:
            SettingsError: it refused what it was told.
            Unavailable: it is gone.
        """
        reply = self._replies.get()
        if isinstance(reply, Refused):
            raise SettingsError(reply.message)
        if reply is None:
            raise Unavailable(f"rank {self._rank} of the worker is gone")
        assert isinstance(reply, kind)
        return reply

    def stop(self) -> None:
        """Tell it to end."""
        if not self._is_closing:
            self._is_closing = True
            with contextlib.suppress(Unavailable):
                self.tell(Stop())

    def hang_up(self) -> None:
        """Leave it without a word, as a process that dies does."""
        self._is_closing = True
        self._pipe.hang_up()

    def close(self) -> None:
        """End it, by force if need be."""
        self.stop()
        self._listener.join(END_S)
        self.process.kill()
        self._listener.join()
        self._pipe.close()

    def _listen(self) -> None:
        while (reply := self._pipe.receive()) is not None:
            self._is_closing |= isinstance(reply, Refused)
            self._replies.put(reply)
        try:
            status = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if not self._is_closing:
            error = Unavailable(f"rank {self._rank} of the worker ended: {describe_status(status)}")
            log.error("rank lost", extra={"rank": self._rank, "status": status})
            self._on_lost(error)
        self._replies.put(None)


def check_devices(device: torch.device, size: int) -> None:
    """Raises SettingsError if there are not as many as ranks."""
    count = torch.cuda.device_count() if device.type == "cuda" else size
    if count < size:
        raise SettingsError(f"tensor_parallel: {size} ranks need a GPU each, and this worker has {count}")


def first_command(folder: ModelFolder, settings: WorkerSettings, meeting_point: str) -> Load:
    return Load(
        rank=0,
        size=settings.tensor_parallel,
        model=ModelSettings(
            model=str(folder.path.resolve()),
            served_name=folder.name,
            max_model_len=folder.max_model_len,
            load_format="dummy" if folder.is_dummy else "auto",
        ),
        options=ModelOptions.of(settings),
        meeting_point=meeting_point,
        instance=settings.mesh.instance or "worker",
        log_level=settings.mesh.log_level,
    )


def _start_process(end: socket.socket) -> subprocess.Popen[bytes]:
    """A rank that dies with this process, and that Ctrl-C in our terminal does not reach."""
    module = ("-P", "-m", "worker_svc.parallel.rank", str(end.fileno()))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), sys.executable, *module],
        stdin=subprocess.DEVNULL,
        pass_fds=[end.fileno()],
        start_new_session=True,
    )
