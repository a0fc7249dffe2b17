"""`weft up`: a whole mesh on this machine, with one command.

Everything that can be wrong is checked before anything is started, and said in one sentence. Ctrl-C drains: the gateway
finishes the streams it has, then the others end. A second Ctrl-C ends all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO, cast

from weft import data_folder, listen, model_folder, nats_server, subjects, template
from weft.child import ChildSpec
from weft.data_folder import DataFolder, RunFile
from weft.errors import SettingsError, WeftError
from weft.exit_status import INTERRUPTED, complain
from weft.messages import Role, WorkerRole
from weft.model_folder import ModelFolder
from weft.presets import PRESETS
from weft.settings import PREFIX, UpSettings, load, to_environ
from weft.status_view import View, make_view
from weft.supervisor import Supervisor
from weft.telemetry import FieldFormatter

FOLLOW_INTERVAL_S: Final = 0.1
# How long the gateway may take to find its model before the user is told what it waits for.
PATIENCE_S: Final = 5.0
EXAMPLE: Final = "Tell me a tale about a fox"
_MODULES: Final[Mapping[Role, str]] = {
    "gateway": "gateway",
    "tokenizer": "tokenizer_svc",
    "scheduler": "scheduler_svc",
    "worker": "worker_svc",
    "cache": "cache_svc",
}
# What a worker's libraries read at their start, unless the user says otherwise (the Dockerfile has the same).
WORKER_ENVIRON: Final[Mapping[str, str]] = {
    # Threads that wait for others spin for 40 microseconds, longer than most have to, and then leave the core to
    # whoever needs it: beside a busy process on both cores a step of one token took 30 ms, with 20000 turns 84 ms.
    "GOMP_SPINCOUNT": "3000",
    # Weights and KV in pages of 2 MiB: decodes were 1.06 to 1.2 times as fast. (Both: AMD EPYC, 125M parameters, 2026.)
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to run, as `plan` decided it."""

    specs: tuple[ChildSpec, ...]
    passwords: Mapping[Role, str]
    url: str
    model: str
    max_model_len: int
    policies: str  # the line that tells the user of them


def main(argv: Sequence[str]) -> int:
    """Run until told to stop; returns the exit status: 0 drained, 1 failed, 2 bad settings, 130 cut short."""
    environ = dict(os.environ)
    began = time.monotonic()
    try:
        settings = load(UpSettings, argv, environ, prog="weft up")
        if settings.worker.mesh.instance:
            raise SettingsError("--instance: `weft up` names its processes itself")
        if settings.gateway.listen_fds:
            raise SettingsError("--listen-fds: `weft up` opens its sockets itself; give --host and --port")
        _check_fork(settings)
        folder, _ = data_folder.take(settings.data_path)
        model = model_folder.read(settings.worker.model)
        model_folder.digest(model)
        settings = _with_scaling(settings)
        with listen.listening(settings.gateway.host, settings.gateway.port) as sockets:
            settings = _with_port(settings, sockets[0].getsockname()[1])
            plan = make_plan(settings, model, folder, environ, sockets)
            return asyncio.run(_run(settings, plan, folder, sys.stdout, began))
    except WeftError as error:
        return complain("weft up", error)


def _check_fork(settings: UpSettings) -> None:
    """Whether workers can be forked; where the GPUs are that `--device auto` finds, the template says it."""
    worker = settings.worker
    if settings.fork and sys.platform != "linux":
        raise SettingsError("--fork: workers are forked under Linux only")
    if settings.fork and (worker.device == "cuda" or worker.tensor_parallel > 1):
        raise SettingsError("--fork: only workers on one CPU share their weights; give --device cpu, or no --fork")


def _with_scaling(settings: UpSettings) -> UpSettings:
    """With scaling all workers that there may ever be are planned for; fewer are started."""
    scheduler = settings.scheduler
    if scheduler.scale == "none":
        for flag, value in (("--prewarm", settings.prewarm), ("--min-workers", scheduler.min_workers)):
            if value:
                raise SettingsError(f"{flag}: it is for --scale, which is none; --workers says how many there are")
        return settings
    if settings.workers > scheduler.max_workers:
        raise SettingsError(
            f"--workers: {settings.workers} are more than --scale may start: --max-workers says how many"
        )
    settings = dataclasses.replace(settings, workers=scheduler.max_workers)
    if set(_worker_roles(settings)) - {"both"}:
        raise SettingsError("--scale: it counts workers that prefill and decode; give --role both as well")
    return settings


def _scaled_and_not(settings: UpSettings, plan: Plan) -> tuple[list[ChildSpec], list[ChildSpec]]:
    """The workers that scaling may start and end, and what is started at once: of these workers the least number."""
    if settings.scheduler.scale == "none":
        return [], list(plan.specs)
    workers = [spec for spec in plan.specs if spec.role == "worker"]
    later = workers[settings.scheduler.min_workers :]
    return workers, [spec for spec in plan.specs if spec not in later]


def make_plan(
    settings: UpSettings,
    model: ModelFolder,
    folder: DataFolder,
    environ: Mapping[str, str],
    sockets: Sequence[socket.socket] = (),
) -> Plan:
    """Which processes, with which environment. `sockets`: what the gateway listens on."""
    own_nats = not settings.nats_url
    passwords: dict[Role, str] = {role: secrets.token_hex(16) for role in subjects.PERMISSIONS} if own_nats else {}
    # Names must differ from those of every other `weft up` on a shared bus, of this host too.
    tail = "" if own_nats else _tail_of(folder)
    base = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    names: list[tuple[Role, int]] = [("gateway", 0), ("tokenizer", 0), ("scheduler", 0), ("cache", 0)]
    names += [("worker", number) for number in range(settings.workers)]
    worker_roles = _worker_roles(settings)
    specs = []
    for index, (role, number) in enumerate(names):
        instance = f"{role}-{number}{tail}"
        mine = _settings_of(settings, role, instance, index, model, folder)
        if own_nats:
            mine |= {"WEFT_NATS_USER": role, "WEFT_NATS_PASSWORD": passwords[role]}
        if role == "worker":
            mine |= {name: value for name, value in WORKER_ENVIRON.items() if name not in environ}
            mine |= _share_of_machine(settings, number, environ) | {"WEFT_ROLE": worker_roles[number]}
        theirs = tuple(sockets) if role == "gateway" else ()
        if theirs:
            mine["WEFT_LISTEN_FDS"] = ",".join(str(one.fileno()) for one in theirs)
        argv = (sys.executable, "-P", "-m", _MODULES[role])
        specs.append(ChildSpec(instance, role, argv, {**base, "PYTHONUNBUFFERED": "1", **mine}, theirs))
    host = {"127.0.0.1": "localhost", "0.0.0.0": "localhost", "::": "localhost"}.get(
        settings.gateway.host, settings.gateway.host
    )
    url = f"http://{host}:{settings.gateway.port}"
    return Plan(tuple(specs), passwords, url, model.name, model.max_model_len, _tell_policies(settings, worker_roles))


def _worker_roles(settings: UpSettings) -> tuple[WorkerRole, ...]:
    """What each worker is for: as the preset divides them, unless they are told."""
    if settings.worker.role == "auto":
        return PRESETS[settings.worker.preset].roles_of(settings.workers)
    return (cast(WorkerRole, settings.worker.role),) * settings.workers


def _tell_policies(settings: UpSettings, roles: Sequence[WorkerRole]) -> str:
    """`Preset mooncake: admit=predicted_reject order=fcfs …`, and how the workers share the work."""
    preset, scheduler, worker = PRESETS[settings.scheduler.preset], settings.scheduler, settings.worker
    names = [f"{family}={getattr(scheduler, family)}" for family in preset.policies]
    told = f"Preset {scheduler.preset}: {' '.join(names)} batching={worker.batching}"
    if worker.reserve != "paged":
        told += f" reserve={worker.reserve}"
    if scheduler.scale != "none":
        return told + f"; {scheduler.min_workers} to {scheduler.max_workers} workers, by scale={scheduler.scale}"
    if set(roles) - {"both"}:
        return told + "; workers: " + ", ".join(f"{count} {role}" for role, count in Counter(roles).items())
    if worker.role == "auto" and len(preset.roles) > 1 and roles:
        least = next(count for count in range(len(preset.roles) + 1) if set(preset.roles_of(count)) - {"both"})
        return told + f"; all workers prefill and decode, since apart takes --workers {least} or more"
    return told


def _tail_of(folder: DataFolder) -> str:
    """What tells one `weft up` from all others and stays the same when it is started again.

    Host and data folder, whose lock only one `weft up` holds. The cache's blocks are found by the name of its instance.
    """
    host = "".join(c for c in socket.gethostname() if c.isalnum())[:20]
    return f"-{host}-{hashlib.blake2b(str(folder.root.resolve()).encode(), digest_size=3).hexdigest()}"


def _settings_of(
    settings: UpSettings, role: Role, instance: str, index: int, model: ModelFolder, folder: DataFolder
) -> dict[str, str]:
    """The environment variables that tell one service its settings."""
    mine = to_environ(getattr(settings, role))
    mine["WEFT_INSTANCE"] = instance
    if "WEFT_MODEL" in mine:
        mine |= {"WEFT_MODEL": str(model.path), "WEFT_SERVED_NAME": model.name}
    if role == "cache" and not settings.cache.disk_path:
        mine["WEFT_DISK_PATH"] = str(folder.kv)
    mine["WEFT_METRICS_PORT"] = str(settings.metrics_port + index if settings.metrics_port else 0)
    return mine


def _share_of_machine(settings: UpSettings, number: int, environ: Mapping[str, str]) -> dict[str, str]:
    """One worker's share of cores and GPUs: they are dealt out, since workers know nothing of each other."""
    share: dict[str, str] = {}
    if settings.workers > 1 and settings.worker.threads == 0:
        share["WEFT_THREADS"] = str(max(1, _num_cores() // settings.workers))
    gpus, count = _gpus(environ), settings.worker.tensor_parallel
    if len(gpus) > 1 and settings.worker.device != "cpu":
        mine = range(number * count, number * count + min(count, len(gpus)))
        share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index % len(gpus)] for index in mine)
    return share


def _num_cores() -> int:
    # Those that this process may use, where the system says which.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(environ: Mapping[str, str]) -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _with_port(settings: UpSettings, port: int) -> UpSettings:
    return dataclasses.replace(settings, gateway=dataclasses.replace(settings.gateway, port=port))


async def _run(settings: UpSettings, plan: Plan, folder: DataFolder, out: TextIO, began: float) -> int:
    view: View
    scaled, at_once = _scaled_and_not(settings, plan)
    supervisor = Supervisor(
        at_once,
        settings.worker.mesh,
        plan.passwords,
        folder,
        lambda news: view.tell(news),
        scaled=scaled,
        num_prewarmed=settings.prewarm if scaled else 0,
        is_forking=settings.fork and settings.workers > 0,
    )
    view = make_view(out, lambda: supervisor.children)
    _log_to(folder.log("supervisor"), settings.worker.mesh.log_level)
    signals = _Signals(supervisor, view)
    follower = asyncio.create_task(_follow(supervisor, folder)) if settings.verbose else None
    try:
        with view:
            running = asyncio.create_task(supervisor.run())
            ready = asyncio.create_task(_until_served(supervisor, settings, view))
            await asyncio.wait((running, ready), return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
        if not running.done():
            folder.write_run_file(_run_file(plan, supervisor))
            took_s = time.monotonic() - began
            view.say(_welcome(plan, folder, took_s, await supervisor.kv_tokens()))
        await running
    finally:
        if follower:
            follower.cancel()
        folder.clear_run()
    return INTERRUPTED if signals.count > 1 else 0


async def _until_served(supervisor: Supervisor, settings: UpSettings, view: View) -> None:
    """Return when all processes are ready and, if there are workers, the gateway has found a model to serve."""
    await supervisor.ready.wait()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.gateway.host, settings.gateway.host)
    patience_ends = time.monotonic() + PATIENCE_S
    while settings.workers:
        answer = await _ask_ready(host, settings.gateway.port)
        if answer.startswith("200 "):
            return
        if time.monotonic() > patience_ends:
            view.say(f"All processes run, but the gateway is not ready: {answer or 'it does not answer'}")
            patience_ends = float("inf")
        await asyncio.sleep(0.05)


async def _ask_ready(host: str, port: int) -> str:
    """The gateway's answer to GET /ready, "200 {…}"; empty if there is none."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET /ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).decode(errors="replace").partition("\r\n\r\n")
            writer.close()
            return f"{head[9:12]} {body.strip()}"
    return ""


class _Signals:
    """Ctrl-C, SIGTERM and a closed terminal: the first drains, the second ends at once."""

    def __init__(self, supervisor: Supervisor, view: View) -> None:
        self.count = 0
        self._supervisor = supervisor
        self._view = view
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self.count += 1
        self._supervisor.stop()
        if self.count == 1:
            self._view.say("\nEnding: running streams may finish; press Ctrl-C again to end at once.")


def _run_file(plan: Plan, supervisor: Supervisor) -> RunFile:
    user = "supervisor" if plan.passwords else ""
    return RunFile(os.getpid(), plan.url, supervisor.nats_url, user, plan.passwords.get("supervisor", ""))


def _welcome(plan: Plan, folder: DataFolder, took_s: float, kv_tokens: Sequence[int]) -> str:
    """`kv_tokens`: how many tokens fit into each worker's KV memory."""
    room = ""
    if kv_tokens:
        each = "its worker's KV memory holds" if len(kv_tokens) == 1 else f"each of {len(kv_tokens)} workers holds"
        room = f"Contexts have up to {min(plan.max_model_len, *kv_tokens):,} tokens; {each} {min(kv_tokens):,}.\n"
    body = json.dumps({"model": plan.model, "messages": [{"role": "user", "content": EXAMPLE}], "stream": True})
    return f"""
Weft serves {plan.model} at {plan.url} (ready after {took_s:.1f} s).
{plan.policies}.
{room}Try

  curl -N {plan.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{body}'

or `weft chat`. Ctrl-C ends it. Logs are in {folder.logs}.
"""


def _log_to(path: Path, level: str) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(FieldFormatter("supervisor"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("nats").setLevel(logging.CRITICAL)


async def _follow(supervisor: Supervisor, folder: DataFolder) -> None:
    """Copy what the children write to their logs to standard error. Ends by being cancelled."""
    offsets: dict[Path, int] = {}
    while True:
        for name in (nats_server.NAME, template.NAME, *supervisor.services):
            path = folder.log(name)
            with contextlib.suppress(OSError), path.open("rb") as source:
                # A trimmed log begins anew.
                source.seek(offsets.get(path, 0) if path.stat().st_size >= offsets.get(path, 0) else 0)
                text = source.read()
                offsets[path] = source.tell()
                sys.stderr.write(text.decode(errors="replace"))
        await asyncio.sleep(FOLLOW_INTERVAL_S)
