"""The scheduler's shell: events from the bus into `ClusterState`, and its actions out.

It decides nothing itself; what it adds are the clock, the bus, and claims for what waits here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, assert_never

from msgspec.structs import replace

from scheduler_svc.actions import Action, Dispatch, Dropped, Lost, Queued, Reject, WantSnapshot
from scheduler_svc.hardware import read_cost
from scheduler_svc.objective import parse_objectives, strictest_ttft_s
from scheduler_svc.policies import PolicyMaker, PolicyNames
from scheduler_svc.policy.route import ASSUMED_HEATMAP
from scheduler_svc.policy.scale import ScaleLimits
from scheduler_svc.scaling import Scaling, check_scale
from scheduler_svc.state import ClusterState
from weft import subjects
from weft.errors import Overloaded, PayloadTooLarge, WeftError
from weft.holder import make_claims
from weft.limits import MAX_PLACED
from weft.messages import (
    CLAIM_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    Assignment,
    BacklogPlace,
    Cancel,
    Control,
    Decision,
    Decisions,
    Declined,
    Ended,
    ErrorInfo,
    Heartbeat,
    KvEvents,
    Placed,
    ScaleAdvice,
    StreamEvent,
    TokenizedRequest,
    WorkerStatus,
)
from weft.service import Context
from weft.settings import SchedulerSettings
from weft.subjects import Returned
from weft.telemetry import totals
from weft.tenants import Tenants

log = logging.getLogger(__name__)

SNAPSHOT_TIMEOUT_S: Final = 5.0
# What is on its way when a drain begins arrives, or comes back, within this time.
SETTLE_S: Final = 1.0
# Decisions within this time are told of together.
TELL_DELAY_S: Final = 0.05


@dataclass(slots=True)
class SchedulerCounters:
    """Since start."""

    requests: int = 0
    dispatched: int = 0
    queued: int = 0
    rejected: int = 0
    dropped: int = 0
    handed_on: int = 0
    declined: int = 0
    returned: int = 0
    snapshots: int = 0
    prompt_blocks: int = 0  # of what was dispatched
    matched_blocks: int = 0  # of those, held by the worker chosen
    decide_s: float = 0.0  # spent on deciding


class SchedulerService:
    """One scheduler on the bus; it serves whatever models the workers do."""

    def __init__(self, settings: SchedulerSettings, context: Context) -> None:
        self._context = context
        self._bus = context.bus
        self._instance = context.instance
        objectives = parse_objectives(settings.slo)
        self._state = ClusterState(
            context.instance,
            PolicyMaker(
                random.Random(),
                settings.max_queued_requests,
                settings.max_queued_tokens,
                cost=read_cost(settings.cost_file),
                objectives=objectives,
                weights=Tenants.read(settings.tenants_file).weights(),
                heatmap=ASSUMED_HEATMAP,
            ),
            PolicyNames(settings.admit, settings.order, settings.route, settings.predict),
        )
        self._scaling: Scaling | None = None
        if settings.scale != "none":
            limits = ScaleLimits(settings.min_workers, settings.max_workers, settings.scale_idle_s)
            self._scaling = Scaling(context.instance, settings.scale, limits, strictest_ttft_s(objectives))
        context.switch_policies = self._switch_policies
        self._asking: set[str] = set()  # workers whose snapshot is on its way
        self._decisions: dict[str, list[Placed]] = {}  # by the gateway to be told
        self._settled = asyncio.Event()
        self._counters = SchedulerCounters()

    # ---- life ----

    async def start(self) -> None:
        await self._bus.on(subjects.ALIVE_ALL, Heartbeat, self._on_heartbeat)
        await self._bus.on_returned(self._on_returned)
        await self._bus.on(subjects.STATUS_ALL, WorkerStatus, self._on_status)
        await self._bus.on(subjects.KV_ALL, KvEvents, self._on_kv)
        await self._bus.on(subjects.ENDED_ALL, Ended, self._on_ended)
        await self._bus.on(subjects.CANCEL, Cancel, self._on_cancel)
        await self._bus.on(subjects.declined(self._instance), Declined, self._on_declined)
        if self._scaling is not None:
            await self._bus.on(subjects.SCALE_ALL, ScaleAdvice, self._on_advice)
        self._bus.on_reconnect.append(lambda: self._state.forgive(time.monotonic()))
        # Requests last: what they meet should be known by then.
        await self._bus.on(subjects.SCHEDULE_ALL, TokenizedRequest, self._on_request, queue="scheduler")
        self._context.spawn(self._tick(), "tick")

    async def drain(self) -> None:
        """Hand the backlog on at once, and wait for what is on its way to arrive."""
        await self._bus.leave(subjects.SCHEDULE_ALL)
        self._carry_out(self._state.drain())
        try:
            async with asyncio.timeout(SETTLE_S):
                while self._state.num_in_flight:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            log.info("assignments unaccounted for at drain", extra={"requests": self._state.num_in_flight})

    async def stop(self) -> None:
        self._carry_out(self._state.drain())
        self._tell_decisions()

    def models(self) -> list[str]:
        return self._state.models()

    def is_live(self) -> bool:
        return True

    def stats(self) -> dict[str, float]:
        return totals(self._counters) | self._state.stats()

    def snapshot(self) -> KvEvents | None:
        return None

    # ---- events ----

    def _on_request(self, request: TokenizedRequest) -> None:
        self._counters.requests += 1
        before = time.perf_counter()
        actions = self._state.on_request(request, time.monotonic())
        self._counters.decide_s += time.perf_counter() - before
        self._carry_out(actions)
        if self._scaling is not None and self._scaling.on_request(request):
            self._advise()

    def _on_ended(self, ended: Ended) -> None:
        self._state.on_ended(ended)
        if self._scaling is not None:
            self._scaling.on_ended(ended)

    def _on_advice(self, advice: ScaleAdvice) -> None:
        if self._scaling is not None and self._scaling.on_advice(advice):
            self._advise()

    def _on_status(self, status: WorkerStatus) -> None:
        self._carry_out(self._state.on_status(status, time.monotonic()))

    def _on_kv(self, events: KvEvents) -> None:
        self._carry_out(self._state.on_kv(events, time.monotonic()))

    def _on_declined(self, declined: Declined) -> None:
        self._counters.declined += 1
        self._carry_out(self._state.on_declined(declined, time.monotonic()))

    def _on_returned(self, hop: Returned, error: WeftError) -> None:
        self._counters.returned += 1
        log.warning("assignment came back", extra={"request_id": hop.request_id, "error": error.message})
        self._carry_out(self._state.on_returned(hop, error, time.monotonic()))

    def _switch_policies(self, changes: Mapping[str, str], model: str) -> dict[str, str]:
        if changes:
            log.info("policies switched", extra={"policies": dict(changes), "model": model or "all"})
            others = {family: name for family, name in changes.items() if family != "scale"}
            scale = changes.get("scale")
            check_scale(self._scaling, scale)
            self._carry_out(self._state.set_policies(others, model or None, time.monotonic()))
            if self._scaling is not None and scale is not None:
                self._scaling.switch(scale, model)
                self._advise()
        scaled = {"scale": self._scaling.policy_of(model)} if self._scaling is not None else {}
        return asdict(self._state.policy_names(model or None)) | scaled

    def _on_cancel(self, cancel: Cancel) -> None:
        self._carry_out(self._state.on_cancel(cancel, time.monotonic()))

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        self._carry_out(self._state.on_heartbeat(beat, time.monotonic()))

    async def _tick(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(CLAIM_INTERVAL_S)
            now = time.monotonic()
            if self._bus.connected and now - before < HEARTBEAT_TIMEOUT_S:
                self._carry_out(self._state.on_tick(now))
            else:
                self._state.forgive(now)
            before = now
            self._send_claims()
            self._advise()

    # ---- actions ----

    def _carry_out(self, actions: Iterable[Action]) -> None:
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            match action:
                case Dispatch():
                    todo.extend(self._dispatch(action))
                case Reject():
                    self._counters.rejected += 1
                    self._send_event(action.request, "rejected", action.error)
                case Queued():
                    self._counters.queued += 1
                    self._send_event(action.request, "queued", place=action.place)
                case Lost():
                    self._counters.handed_on += 1
                    self._send_event(action.request, "lost", action.error)
                case Dropped():
                    self._counters.dropped += 1
                case WantSnapshot():
                    self._ask_snapshot(action.worker)
                case _:
                    assert_never(action)
        if not self._state.num_in_flight:
            self._settled.set()

    def _dispatch(self, action: Dispatch) -> list[Action]:
        """Send an assignment; what is to be done if the bus does not take it."""
        request, decision = action.request, action.decision
        hop = (self._instance, request.gateway, request.request_id, request.epoch)
        stamped = replace(request, stamps={**request.stamps, "scheduler": time.time()})
        try:
            self._bus.send(
                subjects.assign(decision.worker),
                Assignment(stamped, self._instance, action.stop_after),
                reply=subjects.returned("scheduler", *hop),
            )
        except (Overloaded, PayloadTooLarge) as error:
            return self._state.on_returned(Returned(*hop[1:]), error, time.monotonic())
        self._counters.dispatched += 1
        self._counters.prompt_blocks += decision.num_prompt_blocks
        self._counters.matched_blocks += decision.scores[0].matched_blocks
        why = decision if action.stop_after is None else replace(decision, stop_after=action.stop_after)
        self._tell_later(stamped, why)
        return []

    def _tell_later(self, request: TokenizedRequest, decision: Decision) -> None:
        """Let a gateway know of a decision, together with others, since nobody is waiting for it.

        A message each, at once, costs either end about 60 µs of CPU more a request: it wakes a loop (2026).
        """
        if not self._decisions:
            asyncio.get_running_loop().call_later(TELL_DELAY_S, self._tell_decisions)
        placed = Placed(request.request_id, request.epoch, request.num_prompt_tokens, request.stamps, decision)
        self._decisions.setdefault(request.gateway, []).append(placed)

    def _tell_decisions(self) -> None:
        decisions, self._decisions = self._decisions, {}
        for gateway, placed in decisions.items():
            for start in range(0, len(placed), MAX_PLACED):
                message = Decisions(self._instance, placed[start : start + MAX_PLACED])
                self._bus.tell(subjects.events(gateway), message)

    def _ask_snapshot(self, worker: str) -> None:
        if worker not in self._asking:
            self._asking.add(worker)
            self._counters.snapshots += 1
            self._context.spawn(self._fetch_snapshot(worker), f"snapshot of {worker}")

    async def _fetch_snapshot(self, worker: str) -> None:
        """Ask once; if it fails, the worker's next status tells that it is still wanted."""
        try:
            snapshot = await self._bus.ask(
                subjects.control("worker", worker), Control("kv_snapshot"), KvEvents, timeout_s=SNAPSHOT_TIMEOUT_S
            )
        except WeftError as error:
            log.warning("no snapshot", extra={"worker": worker, "error": error.message})
        else:
            if snapshot.holder == worker and snapshot.snapshot:
                self._on_kv(snapshot)
        finally:
            self._asking.discard(worker)

    # ---- news ----

    def _advise(self) -> None:
        """Tell how many workers there should be, and what waits here."""
        if self._scaling is None or self._context.state != "ready":
            return
        now = time.monotonic()
        for advice in self._scaling.advise(self._state.demands(), self._state.schedulers(), now):
            self._bus.tell(subjects.scale(advice.model), advice)

    def _send_claims(self) -> None:
        for gateway, claims in make_claims("scheduler", self._instance, self._state.waiting()):
            self._bus.tell(subjects.events(gateway), claims)

    def _send_event(
        self,
        request: TokenizedRequest,
        kind: Literal["queued", "rejected", "lost"],
        error: WeftError | None = None,
        *,
        place: BacklogPlace | None = None,
    ) -> None:
        event = StreamEvent(
            request.request_id,
            request.epoch,
            kind,
            "scheduler",
            self._instance,
            error=ErrorInfo.of(error) if error is not None else None,
            num_prompt_tokens=request.num_prompt_tokens,
            stamps=request.stamps,
            place=place,
        )
        self._bus.tell(subjects.events(request.gateway), event)
