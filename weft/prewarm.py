"""Worker processes that have imported everything and wait to be told which worker to be.

They are kept while nothing starts, so that they do not take the cores from what does.
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

from weft.child import ChildSpec, orders, restart_delay

log = logging.getLogger(__name__)

FLAG: Final = "--prewarm"
CHECK_INTERVAL_S: Final = 0.25


class Prewarmed:
    """So many processes, replaced as they are taken or die."""

    def __init__(self, count: int, start: Callable[[], Awaitable[Process]]) -> None:
        """`start`: starts one."""
        self._count = count
        self._start = start
        self._processes: list[Process] = []
        self._failures = 0
        self._not_before = 0.0

    def __len__(self) -> int:
        return len(self._processes)

    async def keep(self, is_calm: Callable[[], bool]) -> None:
        """Start what is missing whenever it is calm. Ends by being cancelled."""
        while self._count:
            has_failed = self._drop_dead()
            if len(self._processes) < self._count and is_calm() and time.monotonic() >= self._not_before:
                try:
                    self._processes.append(await self._start())
                except OSError:
                    # No memory or no processes left: it may pass.
                    has_failed = True
            if has_failed:
                self._failures += 1
                self._not_before = time.monotonic() + restart_delay(self._failures)
            await asyncio.sleep(CHECK_INTERVAL_S)

    def take(self, spec: ChildSpec, log_path: Path, environ: Mapping[str, str]) -> Process | None:
        """The process that has waited longest, told to be this worker; None if there is none. Mutates self."""
        self._drop_dead()
        if not self._processes:
            return None
        process = self._processes.pop(0)
        self._failures = 0
        assert process.stdin is not None
        # One that dies now is found dead by whoever waits for its end.
        with contextlib.suppress(OSError, RuntimeError):
            process.stdin.write(orders(spec, log_path, environ))
            process.stdin.close()
        return process

    async def end(self) -> None:
        """Kill all that wait."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in self._processes))
        self._processes.clear()

    def _drop_dead(self) -> bool:
        """Whether any has died since the last time. Mutates self."""
        alive = [process for process in self._processes if process.returncode is None]
        has_died = len(alive) < len(self._processes)
        if has_died:
            log.warning("pre-warmed process died", extra={"left": len(alive)})
        self._processes = alive
        return has_died
