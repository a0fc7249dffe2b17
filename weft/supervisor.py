"""Keeps the processes of one machine's mesh alive: a NATS server, the services, N workers.

Each child has a keeper task: start it, wait for its end, announce the death on the bus at once (same instance, same
epoch: whoever watches need not wait for missed heartbeats), start it again after a growing delay. What a child is doing
is learnt from its heartbeats. A child that beats no more is ended and started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from weft import nats_server, subjects
from weft.bus import Bus
from weft.child import Child, ChildProcess, ChildSpec, News, StartFailed, describe_status, last_words, restart_delay
from weft.data_folder import DataFolder
from weft.errors import SettingsError, WeftError
from weft.exit_status import BAD_SETTINGS
from weft.hashing import BLOCK_SIZE
from weft.messages import Control, ControlReply, Heartbeat, Role, ScaleAdvice
from weft.replicas import Replica, plan_change
from weft.settings import MeshSettings
from weft.starter import Starter

log = logging.getLogger(__name__)

# A child that was ready for this long has recovered from whatever ended it before.
STABLE_S: Final = 30.0
# A ready child that has not beaten for this long hangs. Far above the roster's time-out: streams have long moved on.
HUNG_S: Final = 20.0
# How often a worker that loads is asked how far it is.
LOADING_INTERVAL_S: Final = 0.25
# Deaths before a child was ever ready, after which starting it again is no use.
MAX_START_FAILURES: Final = 5
# Children have nothing left to do once the gateway has drained.
END_S: Final = 10.0


class Supervisor:
    """One machine's processes.

    Args:
        specs: the services, in the order in which they are shown.
        mesh: how the supervisor itself joins the bus. Its `nats_url` is ignored if `passwords` are given.
        passwords: of every role, for a NATS server of our own; empty to join the one at `mesh.nats_url`.
        tell: called with news worth a line.
        scaled: workers that are started and ended as schedulers advise; those of `specs` are there from the start.
        num_prewarmed: processes that have done all of a worker's start that can be done before.
        is_forking: workers are forked from one that has loaded the model, while there is such a process. Linux only.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        mesh: MeshSettings,
        passwords: Mapping[Role, str],
        folder: DataFolder,
        tell: Callable[[News], None],
        *,
        hung_s: float = HUNG_S,
        scaled: Sequence[ChildSpec] = (),
        num_prewarmed: int = 0,
        is_forking: bool = False,
    ) -> None:
        self.nats = Child(nats_server.make_spec(folder)) if passwords else None
        self.services = {spec.name: Child(spec) for spec in specs}
        self.ready = asyncio.Event()  # all were ready at once
        self.nats_url = mesh.nats_url
        self._mesh = mesh
        self._passwords = passwords
        self._folder = folder
        self._tell = tell
        self._hung_s = hung_s
        self._bus: Bus | None = None
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._scaled = {spec.name: spec for spec in scaled}
        self._starter = Starter(specs, scaled, folder, tell, num_prewarmed=num_prewarmed, is_forking=is_forking)
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None  # what ended a keeper
        self._loading: asyncio.Task[None] | None = None

    @property
    def children(self) -> list[Child]:
        return [*([self.nats] if self.nats else []), *self.services.values()]

    def stop(self) -> None:
        """Begin to drain and end all; the second time, kill them. `run` returns when they are gone."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self) -> None:
        """Start all, keep them running until `stop`, end all.

        Raises:
            SettingsError: a child refused its settings; the message is its own.
            StartFailed: a child cannot be started.
        """
        stopped = asyncio.create_task(self._stopping.wait(), name="stopping")
        work = asyncio.create_task(self._work(), name="supervisor")
        try:
            await asyncio.wait((stopped, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                # It only ends by failing: there is nothing to drain.
                self._hurry.set()
                await work
        finally:
            self._stopping.set()
            stopped.cancel()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await self._end_all()

    async def _work(self) -> None:
        if self.nats:
            await self._start_nats(self.nats)
        for child in self.services.values():
            self._keep(child)
        tasks = [
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(self._until_failed(), name="until failed"),
            *self._starter.keep(self._is_calm),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_failed(self) -> None:
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def _start_nats(self, nats: Child) -> None:
        nats_server.write_config(self._folder, self._passwords, -1)
        self._keep(nats)
        port = await self._nats_port(nats)
        # Its next life listens on the same port, so that everybody finds it again.
        nats_server.write_config(self._folder, self._passwords, port)
        self.nats_url = f"nats://127.0.0.1:{port}"
        self._set_ready(nats)

    async def _nats_port(self, nats: Child) -> int:
        keeper = self._keepers[nats.spec.name]
        while not keeper.done():
            if nats.process and (port := nats_server.read_port(self._folder, nats.process.pid)) is not None:
                return port
            await asyncio.sleep(0.005)
        keeper.result()
        raise StartFailed("the NATS server ended")

    # ---- one child ---------------------------------------------------------------------------------------------------

    def _keep(self, child: Child) -> None:
        self._keepers[child.spec.name] = keeper = asyncio.create_task(self._keeper(child), name=child.spec.name)
        keeper.add_done_callback(self._on_keeper_done)

    def _on_keeper_done(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and keeper.exception() is not None:
            self._failure = self._failure or keeper.exception()
            self._failed.set()

    async def _keeper(self, child: Child) -> None:
        while not self._stopping.is_set() and not child.is_leaving:
            try:
                process = await self._spawn(child)
            except OSError as error:
                # No memory or no processes left: it may pass.
                delay = self._fail(child, f"cannot be started: {error.strerror or error}")
            else:
                status = await process.wait()
                self._announce_death(child)
                # Whatever it started itself goes with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                child.process = None
                if self._stopping.is_set() or child.is_leaving:
                    break
                delay = self._judge(child, status)
            child.state = "waiting"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()
        child.state = "ended"
        if child.is_leaving and not self._stopping.is_set():
            del self.services[child.spec.name], self._keepers[child.spec.name]
            self._tell(News(child.spec.name, f"{child.spec.name} has drained and ended", "ready"))

    async def _spawn(self, child: Child) -> ChildProcess:
        child.state, child.since, child.epoch = "starting", time.monotonic(), None
        child.ready_at = child.loaded = 0.0
        path, mine = self._folder.log(child.spec.name), {"WEFT_NATS_URL": self.nats_url} if child.spec.role else {}
        with path.open("ab") as target:
            child.log_offset = target.tell()
        process = child.process = await self._starter.start(child.spec, path, mine)
        if self._stopping.is_set() or child.is_leaving:
            self._signal(child, signal.SIGKILL)
        log.info("started", extra={"child": child.spec.name, "pid": process.pid})
        return process

    def _is_calm(self) -> bool:
        return not any(child.state in ("starting", "waiting") for child in self.services.values())

    def _announce_death(self, child: Child) -> None:
        if child.epoch is None or child.spec.role is None or self._bus is None:
            return
        child.past_epoch = child.epoch
        self._bus.tell(
            subjects.alive(child.spec.role, child.spec.name),
            Heartbeat(child.spec.role, child.spec.name, child.epoch, "dead"),
        )

    def _judge(self, child: Child, status: int) -> float:
        """What to make of a child's end: the delay before its next life. Raises what ends everything."""
        name = child.spec.name
        if status == BAD_SETTINGS and not child.was_ready:
            raise SettingsError(f"{name}: {self._last_words(child)}")
        if status == 0 and child.ready_at:
            # It was told to drain, by `weft drain` or a signal: no fault of its own.
            child.failures = 0
            self._tell(News(name, f"{name} has drained; starting it again", "trouble"))
            return 0.0
        return self._fail(child, f"died ({describe_status(status)})")

    def _fail(self, child: Child, how: str) -> float:
        """Count a failure: the delay before the next try. Raises StartFailed if there is no use in one."""
        name = child.spec.name
        if child.ready_at and time.monotonic() - child.ready_at >= STABLE_S:
            child.failures = 0
        child.failures += 1
        if not child.was_ready and child.failures >= MAX_START_FAILURES:
            raise StartFailed(
                f"{name} {how}, {child.failures} times while starting: {self._last_words(child)} "
                f"(all of it in {self._folder.log(name)})"
            )
        delay = restart_delay(child.failures)
        log.warning("failed", extra={"child": name, "how": how, "delay_s": delay})
        self._tell(News(name, f"{name} {how}; starting it again in {delay:g} s", "trouble"))
        return delay

    def _last_words(self, child: Child) -> str:
        return last_words(self._folder.log(child.spec.name), child.log_offset)

    # ---- as many workers as are advised ------------------------------------------------------------------------------

    def _on_advice(self, advice: ScaleAdvice) -> None:
        """Start and end workers, so that there are as many as the scheduler says."""
        if advice.target is None or self._stopping.is_set():
            return
        those = [child for name, child in self.services.items() if name in self._scaled and not child.is_leaving]
        replicas = (Replica(child.spec.name, child.state == "ready", child.since) for child in those)
        change = plan_change(replicas, min(advice.target, len(self._scaled)), advice.drain)
        for name in change.leaving:
            self._let_go(self.services[name], advice)
        # A name is free again when the process that had it is gone.
        free = [spec for name, spec in self._scaled.items() if name not in self.services]
        for spec in free[: change.num_more]:
            log.info("scaling up", extra={"child": spec.name, "target": advice.target, "reason": advice.reason})
            child = self.services[spec.name] = Child(spec)
            self._keep(child)

    def _let_go(self, child: Child, advice: ScaleAdvice) -> None:
        """Let a worker finish what it holds, and end."""
        log.info("scaling down", extra={"child": child.spec.name, "target": advice.target, "reason": advice.reason})
        child.is_leaving = True
        # Before its first heartbeat it holds nothing, and may take long to listen.
        self._signal(child, signal.SIGTERM if child.epoch is not None else signal.SIGKILL)

    # ---- news from the bus -------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Follow the heartbeats, and end children that beat no more, until all is to stop."""
        self._bus = bus = Bus(self._bus_settings(), "supervisor", f"supervisor-{os.getpid()}")
        await bus.connect()
        bus.on_reconnect.append(self._on_reconnect)
        closed = asyncio.Event()
        bus.on_closed.append(closed.set)
        await bus.on(subjects.ALIVE_ALL, Heartbeat, self._on_beat)
        if self._scaled:
            await bus.on(subjects.SCALE_ALL, ScaleAdvice, self._on_advice)
        await bus.flush()
        self._loading = asyncio.create_task(self._watch_loading(bus), name="watch loading")
        # nats-py may swallow the cancellation of `connect`: the loop's end cannot depend on it.
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, self._hung_s / 4)):
                    await self._stopping.wait()
            if closed.is_set():
                raise StartFailed("NATS closed the connection for good")
            if bus.connected:
                self._end_hung(time.monotonic())
            for child in self.children:
                await asyncio.to_thread(self._folder.trim_log, child.spec.name)

    async def _watch_loading(self, bus: Bus) -> None:
        """Ask workers that load how far they are, until all is to stop."""
        while not self._stopping.is_set():
            await asyncio.gather(
                *(
                    self._ask_loaded(bus, child)
                    for child in self.services.values()
                    if child.spec.role == "worker" and child.state == "starting" and child.epoch is not None
                )
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOADING_INTERVAL_S):
                    await self._stopping.wait()

    async def _ask_loaded(self, bus: Bus, child: Child) -> None:
        child.loaded = (await self._ask_stats(bus, child)).get("engine_loaded", 0.0)

    async def _ask_stats(self, bus: Bus, child: Child) -> dict[str, float]:
        """The worker's numbers; none if it does not say, or not now: it may be loading."""
        try:
            subject = subjects.control("worker", child.spec.name)
            return (await bus.ask(subject, Control("stats"), ControlReply, timeout_s=1.0)).stats
        except WeftError:
            return {}

    async def kv_tokens(self) -> list[int]:
        """How many tokens' KV each worker has room for, of those that say so."""
        workers = [child for child in self.services.values() if child.spec.role == "worker"]
        if self._bus is None:
            return []
        stats = await asyncio.gather(*(self._ask_stats(self._bus, worker) for worker in workers))
        return [int(one["engine_num_blocks"]) * BLOCK_SIZE for one in stats if one.get("engine_num_blocks")]

    def _bus_settings(self) -> MeshSettings:
        if not self._passwords:
            return self._mesh
        return MeshSettings(
            nats_url=self.nats_url,
            nats_user="supervisor",
            nats_password=self._passwords["supervisor"],
            startup_s=self._mesh.startup_s,
        )

    def _on_beat(self, beat: Heartbeat) -> None:
        child = self.services.get(beat.instance)
        if child is None or beat.role != child.spec.role or child.process is None or beat.epoch <= child.past_epoch:
            return
        child.epoch = beat.epoch
        child.last_beat = time.monotonic()
        if beat.state == "ready" and child.state != "ready":
            self._set_ready(child)
        elif beat.state == "draining":
            child.state = "draining"

    def _set_ready(self, child: Child) -> None:
        child.state = "ready"
        child.ready_at = time.monotonic()
        again = " again" if child.was_ready else ""
        child.was_ready = True
        taken = child.ready_at - child.since
        self._tell(News(child.spec.name, f"{child.spec.name} is ready{again} after {taken:.1f} s", "ready"))
        if all(child.state == "ready" for child in self.services.values()):
            self.ready.set()

    def _on_reconnect(self) -> None:
        # While the bus was away nobody could be heard.
        for child in self.services.values():
            child.last_beat = time.monotonic()
        if self.nats and self.nats.state == "starting":
            self._set_ready(self.nats)

    def _end_hung(self, now: float) -> None:
        for child in self.services.values():
            if child.state in ("ready", "draining") and child.process and now - child.last_beat > self._hung_s:
                name = child.spec.name
                self._tell(News(name, f"{name} has not been heard of for {self._hung_s:g} s; ending it", "trouble"))
                self._signal(child, signal.SIGKILL)
                child.state = "ended"

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def _end_all(self) -> None:
        """End the children in the order of the ring: nobody loses what it needs to finish what is running."""
        await self._starter.end()
        self._close_sockets()
        for roles, patience_s in (
            (("gateway",), self._mesh.drain_s + END_S),
            (("tokenizer", "scheduler", "worker"), END_S),
            (("cache",), END_S),
        ):
            await self._end([child for child in self.services.values() if child.spec.role in roles], patience_s)
        if self._loading:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._bus:
            await self._bus.close()
        if self.nats:
            await self._end([self.nats], END_S)
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    def _close_sockets(self) -> None:
        """Leave what the children listen on to those that run: connections are refused once they have ended."""
        for child in self.services.values():
            for listener in child.spec.sockets:
                listener.close()

    async def _end(self, children: Iterable[Child], patience_s: float) -> None:
        alive = [child for child in children if child.process and child.spec.name in self._keepers]
        for child in alive:
            # One that still starts has nothing to drain, and may take long to listen.
            self._signal(child, signal.SIGKILL if child.state == "starting" else signal.SIGTERM)
        keepers = {self._keepers[child.spec.name] for child in alive}
        if not keepers:
            return
        ended = asyncio.ensure_future(asyncio.wait(keepers))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((ended, hurry), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        for child in alive:
            self._signal(child, signal.SIGKILL)
        await ended

    def _signal(self, child: Child, number: signal.Signals) -> None:
        # Not `send_signal`: it may reap the process before asyncio does, and the exit status is lost.
        if child.process and child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, number)
