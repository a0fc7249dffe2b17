"""A process that has loaded the model and forks a worker for each of its orders: `python -m worker_svc --template`.

The workers read the very memory that the weights were loaded into, which the system shares between them for as long
as nobody writes to it. What they write they make themselves: KV blocks, threads, connections. On a CPU, under Linux.
Source: DeepFlow's fork of running task executors (Hu et al. 2025, section 6).

Threads do not survive a fork, and a library that had some waits for them for ever. So one thread does everything here.

A fork is two. The child of a child that ends at once gets the supervisor for its parent, which so learns of its end as
of that of any process that it started, and keeps it when the template dies. It works once the template has told the
supervisor of it and says so: there is no worker that the supervisor does not know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from weft import launch, model_folder
from weft.errors import SettingsError
from weft.exit_status import complain
from weft.model_folder import ModelFolder
from weft.settings import WorkerSettings, load
from weft.start_times import StartTimes
from weft.telemetry import start_logging
from weft.template import NAME, READY
from worker_svc.orders import obey, wait_for_orders

if TYPE_CHECKING:
    from worker_svc.engine_models import EngineModels


def load_to_share(prog: str) -> EngineModels | None:
    """What workers need and do not write; None if their engine has no model. Ends the process on bad settings."""
    try:
        settings = load(WorkerSettings, [], os.environ, prog=prog)
        start_logging(settings.mesh.log_level, NAME)
        return load_models_to_share(model_folder.read(settings.model), settings)
    except SettingsError as error:
        sys.exit(complain(prog, error))


def load_models_to_share(folder: ModelFolder, settings: WorkerSettings) -> EngineModels | None:
    """As `load_to_share`. Raises SettingsError, which names what does not work."""
    if settings.engine == "null":
        return None
    # torch takes seconds to import, and a null worker needs none.
    from worker_svc.engine_models import load_models
    from worker_svc.loaded_model import resolve_device
    from worker_svc.torch_engine import warm_up_models

    if settings.tensor_parallel > 1 or resolve_device(settings.device).type != "cpu":
        raise SettingsError("fork: only workers on one CPU share their weights; give --device cpu, or no --fork")
    models = load_models(folder, dataclasses.replace(settings, threads=1))
    warm_up_models(models)
    return models


def fork_workers() -> StartTimes:
    """Fork a worker for each line of orders. Returns in the workers, as their start; ends the process otherwise."""
    supervisor = os.getppid()
    # Whatever libraries have to say to standard output belongs into the log.
    answers = os.dup(1)
    os.dup2(2, 1)
    # What is loaded by now stays: a collector that looked at it in a worker would copy its pages.
    gc.collect()
    gc.freeze()
    os.write(answers, READY)
    while True:
        line = wait_for_orders()
        times = StartTimes(time.monotonic())
        if _fork(answers):
            os.close(answers)
            _become_worker(supervisor, line)
            times.mark("fork")
            return times


def _fork(answers: int) -> bool:
    """Whether this is the new process, and may work. Raises OSError if there is none."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads would not survive the fork"
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as ends:
        ends.enter_context(ours)
        ends.enter_context(theirs)
        between = os.fork()
        if between == 0:
            ours.close()
            _fork_and_end(theirs)
            # Without a word the template has died, and whoever knows of this process with it.
            if not theirs.recv(1):
                os._exit(1)
            return True
        theirs.close()
        os.waitpid(between, 0)
        pid = ours.recv(16)
        if not pid:
            raise OSError("no process can be forked")
        os.write(answers, pid + b"\n")
        # It may have been killed meanwhile.
        with contextlib.suppress(OSError):
            ours.send(b"1")
    return False


def _fork_and_end(template: socket.socket) -> None:
    """Return in a child of this process, which ends having told the child's id."""
    try:
        if pid := os.fork():
            template.send(str(pid).encode())
            os._exit(0)
    except BaseException:
        os._exit(1)


def _become_worker(supervisor: int, line: bytes) -> None:
    launch.die_with(supervisor)
    # As whatever the supervisor starts: Ctrl-C in its terminal is for it alone.
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    obey(line)
