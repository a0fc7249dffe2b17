"""The life of a service process: settings → bus → start → heartbeat until told to stop → drain → close.

A service is an object with `start`, `drain` and `stop`; `main` does the rest, the same for all. SIGTERM or SIGINT
(or a `drain` from the bus) begins the drain, which has a deadline; a second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import uvloop
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weft import subjects, telemetry
from weft.bus import Bus
from weft.errors import InvalidRequest, SettingsError, Unavailable
from weft.exit_status import complain
from weft.messages import HEARTBEAT_INTERVAL_S, Control, ControlReply, Heartbeat, KvEvents, Role, State
from weft.settings import MeshSettings, load
from weft.start_times import StartTimes

log = logging.getLogger(__name__)


class RoleSettings(Protocol):
    """The settings of any role."""

    @property
    def mesh(self) -> MeshSettings: ...


S = TypeVar("S", bound=RoleSettings)


class Service(Protocol):
    """One role's shell around its pure core."""

    async def start(self) -> None:
        """Load, subscribe, and be ready to work when this returns. Raises SettingsError to end with status 2."""

    async def drain(self) -> None:
        """Take nothing new; return when what is running has ended. May be cancelled at the deadline."""

    async def stop(self) -> None:
        """Let go of everything at once."""

    def models(self) -> list[str]:
        """Names of the models served."""

    def is_live(self) -> bool:
        """False if this process should be restarted: its work has stopped moving."""

    def stats(self) -> dict[str, float]:
        """Numbers for `stats` and /metrics; the name of one that only grows ends in `_total`."""

    def snapshot(self) -> KvEvents | None:
        """The blocks held, for a holder of blocks."""


class Context:
    """What a service may use of its process."""

    def __init__(self, role: Role, mesh: MeshSettings, start_times: StartTimes | None = None) -> None:
        """`start_times`: of a start that did not begin with the process."""
        self.role: Role = role
        self.mesh = mesh
        self.instance = mesh.instance or make_instance(role)
        self.epoch = time.time_ns() // 1000
        self.state: State = "starting"
        self.bus = Bus(mesh, role, self.instance)
        self.start_times = start_times or StartTimes()
        self.registry = CollectorRegistry()
        # Set by a role that has policies: switches those of one model, or of all (""), and says what they are then.
        self.switch_policies: Callable[[Mapping[str, str], str], dict[str, str]] | None = None
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a background task for the life of the service; if it fails, the process ends with status 1."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def beat(self, models: list[str]) -> None:
        """Send one heartbeat now; while the bus is full it is as good as missed."""
        self.bus.tell(
            subjects.alive(self.role, self.instance),
            Heartbeat(self.role, self.instance, self.epoch, self.state, models),
        )

    def stop(self) -> None:
        """Begin the end."""
        self._stopping.set()

    def fail(self, error: BaseException) -> None:
        """End the process with this error."""
        self._failure = self._failure or error
        self._stopping.set()

    async def until_stopped(self) -> None:
        await self._stopping.wait()

    def check(self) -> None:
        """Raise what ended a background task, if one failed."""
        if self._failure:
            raise self._failure

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("background task failed", exc_info=error, extra={"task": task.get_name()})
            self.fail(error)

    async def cancel_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def make_instance(role: Role) -> str:
    """A name that no other instance has: host, process and a random tail, so that logs can be told apart."""
    host = "".join(c for c in socket.gethostname() if c.isalnum())[:20] or "host"
    return f"{role}-{host}-{os.getpid()}-{secrets.token_hex(2)}"


async def run(context: Context, service: Service) -> None:
    """Run a service until a signal, a `drain` from the bus, or the failure of one of its tasks."""
    _catch_signals(context)
    server = None
    context.start_times.mark("imports")
    try:
        await context.bus.connect()
        context.start_times.mark("connect")
        context.bus.on_closed.append(lambda: context.fail(Unavailable("NATS closed the connection for good")))
        context.spawn(_heartbeat(context, service), "heartbeat")
        context.registry.register(_BusCollector(context, service))
        if context.mesh.metrics_port:
            server = telemetry.serve(
                context.mesh.metrics_host,
                context.mesh.metrics_port,
                context.registry,
                service.is_live,
                lambda: context.state == "ready" and context.bus.connected,
            )
        await _answer_control(context, service)
        await service.start()
        await context.bus.flush()
        context.state = "ready"
        context.beat(service.models())
        context.start_times.mark("ready")
        times = context.start_times.fields()
        log.info("ready", extra={"role": context.role, "instance": context.instance, **times})
        await context.until_stopped()
        context.check()
        context.state = "draining"
        context.beat(service.models())
        log.info("draining", extra={"deadline_s": context.mesh.drain_s})
        await _drain(context, service)
    finally:
        await service.stop()
        await context.cancel_tasks()
        context.state = "dead"
        if context.bus.connected:
            context.beat(service.models())
        await context.bus.close()
        if server:
            server.shutdown()
    context.check()


def main(
    settings_class: type[S],
    role: Role,
    make: Callable[[S, Context], Service],
    *,
    prog: str,
    argv: Sequence[str] | None = None,
    start_times: StartTimes | None = None,
) -> None:
    """Entry point of `python -m <service>`. Exits 0 after a drain, 2 on bad settings, 1 on failure.

    `start_times`: as `Context`.
    """
    try:
        settings = load(settings_class, sys.argv[1:] if argv is None else argv, os.environ, prog=prog)
    except SettingsError as error:
        sys.exit(complain(prog, error))
    mesh = settings.mesh

    async def body() -> None:
        context = Context(role, mesh, start_times)
        telemetry.start_logging(mesh.log_level, context.instance)
        await run(context, make(settings, context))

    try:
        uvloop.run(body())
    except (SettingsError, Unavailable) as error:
        status = complain(prog, error)
        # All that is tidied up at an exit, but for what libraries do to threads that wait in vain: torch's, which wait
        # for a rank that is gone, would abort the process.
        atexit._run_exitfuncs()
        os._exit(status)


def _catch_signals(context: Context) -> None:
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def on_signal(number: int) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        context.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


async def _heartbeat(context: Context, service: Service) -> None:
    while True:
        if service.is_live():
            context.beat(service.models())
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)


async def _drain(context: Context, service: Service) -> None:
    try:
        async with asyncio.timeout(context.mesh.drain_s):
            await service.drain()
    except TimeoutError:
        log.warning("drain deadline passed", extra={"deadline_s": context.mesh.drain_s})


async def _answer_control(context: Context, service: Service) -> None:
    async def on_control(control: Control) -> ControlReply | KvEvents:
        match control.verb:
            case "drain":
                context.stop()
            case "stats":
                return ControlReply(context.state, service.stats())
            case "policies":
                if context.switch_policies is None:
                    raise InvalidRequest(f"a {context.role} has no policies to switch")
                policies = context.switch_policies(control.policies, control.model)
                return ControlReply(context.state, policies=policies)
            case "kv_snapshot":
                snapshot = service.snapshot()
                if snapshot is not None:
                    return snapshot
        return ControlReply(context.state)

    await context.bus.answer(subjects.control(context.role, context.instance), Control, on_control)


class _BusCollector(Collector):
    """The bus's and the service's counters, read when scraped."""

    def __init__(self, context: Context, service: Service) -> None:
        self._context = context
        self._service = service

    def collect(self) -> list[Metric]:
        found = telemetry.totals(self._context.bus.stats, "bus_")
        found |= {f"{self._context.role}_{name}": value for name, value in self._service.stats().items()}
        return [
            (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                f"weft_{name}", f"{name.replace('_', ' ')}.", value=value
            )
            for name, value in found.items()
        ]
