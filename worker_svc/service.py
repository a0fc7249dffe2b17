"""The worker's shell: assignments in, one frame a step and gateway out; the engine runs in a thread of its own.

It decides whether there is room and what is stale (`held.py`); which tokens are computed when is the engine's
business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Literal, cast

from weft import model_folder, subjects
from weft.bus import Bus
from weft.columns import unpack_u32
from weft.errors import Unavailable, WeftError
from weft.holder import MissingGateways, make_claims
from weft.messages import (
    CLAIM_INTERVAL_S,
    FINISH_LENGTH,
    FINISH_STOP,
    HEARTBEAT_TIMEOUT_S,
    Assignment,
    Cancel,
    Declined,
    ErrorInfo,
    Heartbeat,
    KvEvents,
    State,
    TokenizedRequest,
    WorkerRole,
)
from weft.model_folder import ModelFolder
from weft.roster import Change, Roster
from weft.service import Context
from weft.settings import WorkerSettings
from weft.subjects import Returned
from weft.telemetry import totals
from worker_svc.checks import check_request
from worker_svc.engine_io import ENGINE_TOTALS, Add, Drop, EngineLoad, EngineThread, StepOutput, TokenRow
from worker_svc.held import HeldRequest, HeldTable
from worker_svc.kv_transfer import PATIENCE_S, KvTransfer
from worker_svc.null_engine import NullEngine
from worker_svc.reports import Reports

if TYPE_CHECKING:
    from worker_svc.engine_models import EngineModels

log = logging.getLogger(__name__)

# Changes of room within this time share one WorkerStatus.
STATUS_DELAY_S: Final = 0.005


@dataclass(slots=True)
class WorkerCounters:
    """Since start."""

    accepted: int = 0
    declined: int = 0
    rejected: int = 0
    stale: int = 0
    handed_on: int = 0
    gateways_lost: int = 0
    frames: int = 0


class WorkerService:
    """One model replica on the bus."""

    def __init__(self, settings: WorkerSettings, context: Context, models: EngineModels | None = None) -> None:
        """`models`: loaded before, to be used if they are what the settings want."""
        self._settings = settings
        self._models = models
        self._context = context
        self._bus = context.bus
        self._instance = context.instance
        self._folder: ModelFolder | None = None
        self._engine: EngineThread | None = None
        self._kv: KvTransfer | None = None
        self._state: State = "starting"
        self._held = HeldTable()
        self._empty = asyncio.Event()
        self._roster = Roster()
        self._missing = MissingGateways(self._roster)
        role = cast(WorkerRole, "both" if settings.role == "auto" else settings.role)
        self._reports = Reports(context.instance, context.epoch, role)
        self._status_timer: asyncio.TimerHandle | None = None
        self._num_steps_seen = -1
        self._moved_at = time.monotonic()
        self._counters = WorkerCounters()

    # ---- life ----

    async def start(self) -> None:
        await self._bus.on(subjects.ALIVE_ALL, Heartbeat, self._on_heartbeat)
        await self._bus.on_returned(self._on_returned)
        self._folder = await asyncio.to_thread(model_folder.read, self._settings.model)
        loop = asyncio.get_running_loop()

        def hand_over(output: StepOutput) -> None:
            # Runs in the engine's thread; all else happens on the loop.
            loop.call_soon_threadsafe(self._on_output, output)

        times = self._context.start_times
        times.mark("folder")
        engine = await asyncio.to_thread(_make_engine, self._folder, self._settings, self._models)
        times.mark("imports")
        # Before it has started: `stats` tells how far it has loaded.
        self._engine = engine
        await asyncio.to_thread(engine.start, hand_over)
        times.mark("load")
        times.move(engine.load.warm_up_s, "load", "warm_up")
        await self._start_kv(engine)
        await self._bus.on(subjects.CANCEL, Cancel, self._on_cancel)
        await self._bus.on(subjects.assign(self._instance), Assignment, self._on_assignment)
        self._bus.on_reconnect.append(self._on_reconnect)
        self._state = "ready"
        self._send_status()
        self._context.spawn(self._tick(), "tick")

    async def drain(self) -> None:
        """Let what runs finish; at the deadline, which cancels this, hand on what is left."""
        self._state = "draining"
        self._send_status()
        try:
            while len(self._held):
                self._empty.clear()
                await self._empty.wait()
        finally:
            self._hand_on()

    async def stop(self) -> None:
        self._state = "draining"
        self._hand_on()
        if self._status_timer is not None:
            self._status_timer.cancel()
        # An engine that is stuck would be waited for in vain; its thread ends with the process.
        if self._engine is not None and self.is_live():
            await asyncio.to_thread(self._engine.stop)
        if self._kv is not None:
            await self._kv.stop()

    async def _start_kv(self, engine: EngineThread) -> None:
        """Without a transfer the engine is never told of a cache service, and so neither offloads nor loads."""
        if engine.block_bytes and (self._settings.kv_offload != "never" or self._settings.kv_load != "never"):
            bus = Bus(self._settings.mesh, "worker", f"{self._instance}-kv")
            # Who only decodes gets prompts that were computed a moment ago.
            patience_s = PATIENCE_S if self._settings.role == "decode" else 0.0
            self._kv = KvTransfer(bus, engine, patience_s=patience_s)
            await self._kv.start()
            self._watch_caches()

    def models(self) -> list[str]:
        return [self._folder.name] if self._folder else []

    def is_live(self) -> bool:
        if self._engine is None:
            return True
        load, now = self._engine.load, time.monotonic()
        if load.failure is not None:
            return False
        if load.is_idle or load.num_steps != self._num_steps_seen:
            self._num_steps_seen = load.num_steps
            self._moved_at = now
        return now - self._moved_at <= self._settings.engine_stall_s

    def stats(self) -> dict[str, float]:
        load = self._engine.load if self._engine else EngineLoad()
        numbers = {item.name: getattr(load, item.name) for item in fields(load)}
        found = {
            f"engine_{name}{'_total' if name in ENGINE_TOTALS else ''}": float(value)
            for name, value in numbers.items()
            if isinstance(value, int | float)
        }
        found |= totals(self._counters)
        found |= {"held_requests": float(len(self._held)), "held_sequences": float(self._held.num_sequences)}
        if self._kv is not None:
            found |= {f"kv_{name}": value for name, value in self._kv.stats().items()}
        return found

    def snapshot(self) -> KvEvents | None:
        if self._engine is None:
            return None
        return self._reports.kv_snapshot(self._engine.load.cached_hashes())

    # ---- messages in ----

    def _on_assignment(self, assignment: Assignment) -> None:
        request, num_choices = assignment.request, len(assignment.request.choices)
        self._end_lower_epochs(request)
        if self._state == "draining":
            self._decline(assignment)
            return
        stale = self._held.is_stale(request.request_id, request.epoch)
        if not stale and self._is_full(num_choices):
            self._decline(assignment)
            return
        # Taken or refused for good, it is under way no more: the scheduler may send others.
        self._reports.accept(assignment.scheduler, num_choices, self._schedulers())
        if stale:
            self._counters.stale += 1
        else:
            self._admit(request, assignment.stop_after)
        self._room_changed()

    def _on_cancel(self, cancel: Cancel) -> None:
        slots = tuple(unpack_u32(cancel.slots))
        held = self._held.get(cancel.request_id, cancel.epoch)
        if held is not None and cancel.num_output_tokens:
            ends = zip(slots or tuple(held.slots), unpack_u32(cancel.num_output_tokens), strict=False)
            # What has ended here by itself has been told already.
            self._tell_ended([(held, count) for slot, count in ends if slot in held.slots])
        if self._held.cancel(cancel.request_id, cancel.epoch, slots):
            self._drop(cancel.request_id, cancel.epoch, slots)

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        self._apply(self._roster.apply(beat, time.monotonic()))

    def _on_returned(self, hop: Returned, error: WeftError) -> None:
        """A request that this worker declined did not get back to its scheduler."""
        self._send_event(hop, "lost", ErrorInfo.of(error))

    def _on_reconnect(self) -> None:
        self._forgive(time.monotonic())
        self._send_claims()
        self._send_status()

    # ---- the engine's output ----

    def _on_output(self, output: StepOutput) -> None:
        for started in output.started:
            held = self._held.get(started.request_id, started.epoch)
            if held is not None:
                stamps = {**held.stamps, "started": time.time() - (time.monotonic() - started.at)}
                self._bus.tell(subjects.events(started.gateway), self._reports.started(started, stamps))
        for progress in output.progress:
            self._bus.tell(subjects.events(progress.gateway), self._reports.progress(progress))
        if output.rows:
            self._send_frames(output.rows)
        if output.stored or output.removed:
            self._bus.tell(subjects.kv(self._instance), self._reports.kv_events(output.stored, output.removed))
        for request_id, epoch in output.ended:
            self._held.end(request_id, epoch)
        if output.ended:
            self._room_changed()
        if self._kv is not None:
            self._kv.offload(output.offload)
            for wanted in output.load:
                self._kv.load(wanted)

    def _send_frames(self, rows: tuple[TokenRow, ...]) -> None:
        for gateway, frame in self._reports.frames(rows):
            self._counters.frames += 1
            self._bus.tell(subjects.frames(gateway), frame)
        finished = [row for row in rows if row.finish]
        self._tell_ended(
            [
                (held, row.first_index + len(row.token_ids))
                for row in finished
                if row.finish in (FINISH_STOP, FINISH_LENGTH)
                and (held := self._held.get(row.request_id, row.epoch)) is not None
                and row.slot in held.slots
            ]
        )
        for row in finished:
            self._held.finish(row.request_id, row.epoch, row.slot)
        if finished:
            self._room_changed()

    def _tell_ended(self, ends: list[tuple[HeldRequest, int]]) -> None:
        """`ends`: choices that are held still, and the tokens that each has generated."""
        if ends and self._folder is not None:
            self._bus.tell(subjects.ended(self._instance), self._reports.ended(self._folder.name, ends))

    # ---- taking and letting go ----

    def _end_lower_epochs(self, request: TokenizedRequest) -> None:
        """A higher epoch ends the lower ones, whether or not there is room for it."""
        if request.epoch and self._held.cancel(request.request_id, request.epoch - 1):
            self._drop(request.request_id, request.epoch - 1)

    def _is_full(self, num_choices: int) -> bool:
        # A request with more choices than there is room for gets the worker for itself.
        held = self._held.num_sequences
        return held > 0 and held + num_choices > self._settings.max_num_seqs

    def _admit(self, request: TokenizedRequest, stop_after: int | None) -> None:
        assert self._engine is not None and self._folder is not None
        try:
            check_request(
                request,
                model=self._folder.name,
                vocab_size=self._folder.vocab_size,
                max_model_len=self._folder.max_model_len,
            )
        except WeftError as error:
            self._counters.rejected += 1
            self._send_event(request, "rejected", ErrorInfo.of(error))
            return
        self._counters.accepted += 1
        self._held.take(request, {**request.stamps, "worker": time.time()})
        self._engine.submit(Add(request, stop_after))

    def _decline(self, assignment: Assignment) -> None:
        request = assignment.request
        self._counters.declined += 1
        self._bus.tell(
            subjects.declined(assignment.scheduler),
            Declined(request, self._instance),
            reply=subjects.returned("worker", self._instance, request.gateway, request.request_id, request.epoch),
        )

    def _drop(self, request_id: str, epoch: int, slots: tuple[int, ...] = ()) -> None:
        if self._engine is not None:
            self._engine.submit(Drop(request_id, epoch, slots))
        self._room_changed()

    def _drop_gateway(self, gateway: str) -> None:
        """The gateway is gone, and with it every reader of its streams."""
        lost = self._held.of_gateway(gateway)
        if lost:
            self._counters.gateways_lost += 1
            log.warning("gateway lost", extra={"gateway": gateway, "requests": len(lost)})
        for held in lost:
            self._held.cancel(held.request_id, held.epoch)
            self._drop(held.request_id, held.epoch)

    def _hand_on(self) -> None:
        """Give everything back to the gateways, which recover it elsewhere.

        Not when the engine failed: they shall see a worker that died, and count it against what it held.
        """
        if not self.is_live():
            return
        for held in self._held:
            self._counters.handed_on += 1
            self._send_event(held, "lost", ErrorInfo.of(Unavailable("the worker is draining")))
            self._held.cancel(held.request_id, held.epoch)
            self._drop(held.request_id, held.epoch)

    # ---- who is there ----

    def _apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            member = change.member
            if member.role == "gateway" and change.kind == "left":
                self._drop_gateway(member.instance)
            elif member.role == "cache":
                self._watch_caches()

    def _schedulers(self) -> Iterator[str]:
        return (member.instance for member in self._roster.members("scheduler"))

    def _watch_caches(self) -> None:
        if self._kv is not None:
            self._kv.set_shards(member.instance for member in self._roster.members("cache") if member.state == "ready")

    # ---- news ----

    async def _tick(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(CLAIM_INTERVAL_S)
            assert self._engine is not None
            if self._engine.load.failure is not None:
                raise self._engine.load.failure
            now = time.monotonic()
            if self._bus.connected and now - before < HEARTBEAT_TIMEOUT_S:
                self._apply(self._roster.expire(now))
                for gateway in self._missing.find({held.gateway for held in self._held}, now):
                    self._drop_gateway(gateway)
            else:
                # Cut off, or asleep: the others' silence proves nothing.
                self._forgive(now)
            self._send_claims()
            self._send_status()
            before = now

    def _forgive(self, now: float) -> None:
        self._roster.forgive(now)
        self._missing.forgive()

    def _send_claims(self) -> None:
        # Nothing is claimed that does not move: the gateways take it elsewhere.
        if self.is_live():
            for gateway, claims in make_claims("worker", self._instance, self._held):
                self._bus.tell(subjects.events(gateway), claims)

    def _room_changed(self) -> None:
        if not len(self._held):
            self._empty.set()
        if self._status_timer is None:
            self._status_timer = asyncio.get_running_loop().call_later(STATUS_DELAY_S, self._send_status)

    def _send_status(self) -> None:
        if self._status_timer is not None:
            self._status_timer.cancel()
            self._status_timer = None
        if self._engine is not None and self._folder is not None:
            status = self._reports.status(
                self._folder,
                self._state,
                self._engine.load,
                self._held.num_sequences,
                self._settings.max_num_seqs,
                self._kv.block_load_s if self._kv is not None else 0.0,
            )
            self._bus.tell(subjects.status(self._instance), status)

    def _send_event(
        self, about: HeldRequest | TokenizedRequest | Returned, kind: Literal["rejected", "lost"], error: ErrorInfo
    ) -> None:
        self._bus.tell(subjects.events(about.gateway), self._reports.event(about, kind, error))


def _make_engine(folder: ModelFolder, settings: WorkerSettings, models: EngineModels | None) -> EngineThread:
    if settings.engine == "null":
        return NullEngine(folder, settings)
    # torch takes seconds to import, and a null worker needs none.
    from worker_svc.torch_engine import TorchEngine

    if models is not None and not models.are_for(folder, settings):
        log.warning("the template has loaded something else; loading anew")
        models = None
    return TorchEngine(folder, settings, models)
