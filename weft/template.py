"""A process that has loaded a model and forks workers, which share the memory of its weights.

A worker forked is a child of the supervisor like any other (see `worker_svc.template`): it outlives the template, dies
with the supervisor, and its end and exit status are seen. While there is no template, workers start without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from weft.child import ChildSpec, News, describe_status, last_words, orders, restart_delay
from weft.errors import SettingsError
from weft.exit_status import BAD_SETTINGS

log = logging.getLogger(__name__)

FLAG: Final = "--template"
NAME: Final = "template"
# What it says when it has loaded; afterwards every line is the id of a process.
READY: Final = b"ready\n"
# numpy would start threads as it is imported, which do not survive a fork.
ENVIRON: Final[Mapping[str, str]] = {"OPENBLAS_NUM_THREADS": "1"}
# A fork takes milliseconds. A template that takes longer than this hangs.
PATIENCE_S: Final = 10.0


class ForkedProcess:
    """A child of this process that it did not start itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._on_end)

    async def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return await asyncio.shield(self._ended)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set_result(self.returncode)


class Template:
    """One such process, started again when it dies."""

    def __init__(
        self,
        start: Callable[[], Awaitable[Process]],
        tell: Callable[[News], None],
        log_path: Path,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`start`: starts it in a session of its own, with pipes for its standard input and output."""
        self._start = start
        self._tell = tell
        self._log_path = log_path
        self._patience_s = patience_s
        self._process: Process | None = None
        # Without a result while it loads; None while there is none.
        self._ready: asyncio.Future[Process | None] = asyncio.get_running_loop().create_future()
        self._one_fork = asyncio.Lock()
        self._forked: list[ForkedProcess] = []  # that run
        self._was_ready = False
        self._failures = 0

    async def keep(self) -> None:
        """Have one at all times. Ends by being cancelled.

        Raises:
            SettingsError: it refuses its settings; the message is its own.
        """
        while True:
            try:
                how = await self._live()
            finally:
                self._set(None)
            await self._end_unfinished()
            self._failures += 1
            log.warning("template failed", extra={"how": how})
            self._tell(News(NAME, f"the template {how}; workers start without it until it is there again", "trouble"))
            await asyncio.sleep(restart_delay(self._failures))
            self._ready = asyncio.get_running_loop().create_future()

    async def fork(self, spec: ChildSpec, log_path: Path, environ: Mapping[str, str]) -> ForkedProcess | None:
        """A new process that becomes this worker, once the template has loaded; None if there is no template."""
        async with self._one_fork:
            process = await asyncio.shield(self._ready)
            if process is None:
                return None
            assert process.stdin is not None
            # One that has died gives no answer.
            with contextlib.suppress(OSError, RuntimeError):
                process.stdin.write(orders(spec, log_path, environ))
            answer = await self._answer_of(process)
            if not answer:
                return None
            self._failures = 0
            forked = ForkedProcess(int(answer))
            self._forked = [*(one for one in self._forked if one.returncode is None), forked]
            return forked

    async def end(self) -> None:
        """Kill it; there will be no other. Workers go on."""
        self._set(None)
        if self._process is not None:
            _kill(self._process)
            await self._process.wait()

    async def _live(self) -> str:
        """One life of it, and how that ended."""
        began = time.monotonic()
        try:
            process = self._process = await self._start()
        except OSError as error:
            # No memory or no processes left: it may pass.
            return f"cannot be started: {error.strerror or error}"
        assert process.stdout is not None
        if await process.stdout.readline() == READY:
            self._was_ready = True
            log.info("template ready", extra={"pid": process.pid})
            self._tell(News(NAME, f"the template is ready after {time.monotonic() - began:.1f} s", "ready"))
            self._set(process)
        status = await process.wait()
        if status == BAD_SETTINGS and not self._was_ready:
            raise SettingsError(f"{NAME}: {last_words(self._log_path)}")
        return f"died ({describe_status(status)})"

    async def _end_unfinished(self) -> None:
        """End what a template that died has forked and not told of: a zombie, since nobody else waits for it."""
        if self._process is None:
            return
        group = self._process.pid
        # Whoever it told of is known when the fork that is under way has come to its end.
        async with self._one_fork:
            # The template itself has been waited for: whoever has its number is another.
            others = {group, *(forked.pid for forked in self._forked)}
            # What is forked is in the template's group until it becomes a worker, and may fork once more meanwhile.
            while pids := [pid for pid in children_in_group(group) if pid not in others]:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                await asyncio.gather(*(ForkedProcess(pid).wait() for pid in pids))

    async def _answer_of(self, process: Process) -> bytes:
        """The id of a forked process; nothing of a template that died before it could tell: it has forked none."""
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._patience_s):
                return await process.stdout.readline()
        except TimeoutError:
            _kill(process)
            return await process.stdout.readline()

    def _set(self, process: Process | None) -> None:
        """Tell all that wait. Mutates self."""
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_result(process)


def children_in_group(group: int) -> list[int]:
    """Children of this process that are in a process group, zombies too. On Linux only."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # One that is not ours may end at any time.
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, group.
            _, parent, own_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(parent) == os.getpid() and int(own_group) == group:
                found.append(int(path.parent.name))
    return found


def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
