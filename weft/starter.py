"""How the supervisor's children are started, each by the fastest of the ways that there are.

A worker is forked by a process that has loaded the model (`template.py`), or it is one that has done its imports and
waits (`prewarm.py`); all others, and workers while there is no such process, are started anew.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weft import launch, prewarm, template
from weft.child import ChildProcess, ChildSpec, News
from weft.data_folder import DataFolder
from weft.prewarm import Prewarmed
from weft.template import Template


class Starter:
    """Starts processes, and keeps those that make it fast.

    Args:
        specs: the services.
        scaled: workers that are started as schedulers advise.
        tell: called with news worth a line.
        num_prewarmed: processes that have done all of a scaled worker's start that can be done before.
        is_forking: workers are forked from one that has loaded the model, while there is such a process. Linux only.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        scaled: Sequence[ChildSpec],
        folder: DataFolder,
        tell: Callable[[News], None],
        *,
        num_prewarmed: int = 0,
        is_forking: bool = False,
    ) -> None:
        self._workers = [spec for spec in (*specs, *scaled) if spec.role == "worker"]
        self._scaled = {spec.name: spec for spec in scaled}
        self._folder = folder
        self._prewarmed = Prewarmed(num_prewarmed, self._start_prewarmed)
        self._template = Template(self._start_template, tell, folder.log(template.NAME)) if is_forking else None

    def keep(self, is_calm: Callable[[], bool]) -> list[asyncio.Task[None]]:
        """Tasks that have processes ready at all times; they end by being cancelled, or by a SettingsError."""
        tasks = [asyncio.create_task(self._prewarmed.keep(is_calm), name="prewarm")]
        if self._template:
            # Workers are forked by another process, and are to be children of this one.
            launch.adopt_orphans()
            tasks.append(asyncio.create_task(self._template.keep(), name="template"))
        return tasks

    async def start(self, spec: ChildSpec, log_path: Path, environ: Mapping[str, str]) -> ChildProcess:
        """A process of the child, with `environ` beside the spec's own. Raises OSError if there can be none now."""
        process: ChildProcess | None = None
        if self._template and spec.role == "worker":
            process = await self._template.fork(spec, log_path, environ)
        if process is None and spec.name in self._scaled:
            process = self._prewarmed.take(spec, log_path, environ)
        descriptors = [listener.fileno() for listener in spec.sockets]
        return process or await _execute(spec.argv, {**spec.environ, **environ}, log_path, descriptors=descriptors)

    async def end(self) -> None:
        """Kill those that wait to become workers. Call it when the tasks of `keep` have ended."""
        await self._prewarmed.end()
        if self._template:
            await self._template.end()

    async def _start_prewarmed(self) -> Process:
        spec = next(iter(self._scaled.values()))
        return await _execute((*spec.argv, prewarm.FLAG), spec.environ, self._folder.log("prewarmed"), PIPE)

    async def _start_template(self) -> Process:
        spec = self._workers[0]
        environ = {**spec.environ, **template.ENVIRON}
        return await _execute((*spec.argv, template.FLAG), environ, self._folder.log(template.NAME), PIPE, PIPE)


async def _execute(
    argv: Sequence[str],
    environ: Mapping[str, str],
    log_path: Path,
    stdin: int = DEVNULL,
    stdout: int | None = None,
    descriptors: Sequence[int] = (),
) -> Process:
    with log_path.open("ab") as target:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), str(os.getpid()), *argv,
            env=environ,
            stdin=stdin,
            stdout=target if stdout is None else stdout,
            stderr=target,
            # A session of its own: the terminal's Ctrl-C is for us, and we say who ends when.
            start_new_session=True,
            pass_fds=descriptors,
        )  # fmt: skip
