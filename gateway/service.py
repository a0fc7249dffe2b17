"""The gateway's shell: the bus on one side, the HTTP server on the other, the request table between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
import uuid
from collections.abc import Mapping
from typing import Final, TypeVar

from aiohttp import web

from gateway.answer import Answer
from gateway.app import Routes
from gateway.assembler import Assembler
from gateway.auth import ApiKeys
from gateway.explain import Book
from gateway.metrics import Metrics
from gateway.models import ModelTable
from gateway.quota import Quotas
from gateway.streams import Patience, Request, RequestTable
from weft import listen, subjects
from weft.errors import Overloaded, SettingsError, Unavailable, WeftError
from weft.messages import (
    HEARTBEAT_INTERVAL_S,
    Cancel,
    Claims,
    Decisions,
    DetokenizeQuery,
    GenerateRequest,
    Heartbeat,
    KvEvents,
    Role,
    ScaleAdvice,
    StreamEvent,
    TokenFrame,
    TokenizeQuery,
)
from weft.roster import Change, Roster
from weft.service import Context
from weft.settings import GatewaySettings
from weft.subjects import Returned
from weft.telemetry import totals
from weft.tenants import Tenants

log = logging.getLogger(__name__)
M = TypeVar("M")
TICK_S: Final = 0.1
QUERY_TIMEOUT_S: Final = 10.0
# How long connections may take to close once their requests have ended; aiohttp waits for it twice.
SHUTDOWN_S: Final = 0.5
# A loop that turns less often than this is stuck, not busy.
LIVE_S: Final = 10.0
# In which a mesh that is up is heard of: everybody's heartbeat, and what there is to know of a model.
HEAR_S: Final = 3 * HEARTBEAT_INTERVAL_S
# Who has been advised to start workers this lately does so for the next request.
ADVISED_S: Final = 3.0
_NEEDED: Final[tuple[Role, ...]] = ("tokenizer", "scheduler", "worker")


class GatewayService:
    """Owns every request from its first byte to its last."""

    def __init__(self, settings: GatewaySettings, context: Context) -> None:
        self.bus = context.bus
        self.registry = context.registry
        self.model_table = ModelTable(context.bus)
        self.metrics = Metrics(context.registry)
        self.table = RequestTable(
            context.instance, Patience(settings.wait_for_role_s, settings.stall_s), self._send, random.random
        )
        self.tenants = Tenants.read(settings.tenants_file)
        self._quotas = Quotas(self.tenants)
        self._explained = Book(settings.explained_requests)
        self._settings = settings
        self._context = context
        self._roster = Roster()
        self._routes = Routes(self, settings, ApiKeys.read(settings.api_keys_file))
        self._runner: web.AppRunner | None = None
        self._idle = asyncio.Event()
        self._is_draining = False
        self._advised_at = float("-inf")
        self._ticked_at = time.monotonic()

    # ---- weft.service.Service

    async def start(self) -> None:
        bus, instance = self.bus, self._context.instance
        heard = TokenFrame | StreamEvent | Decisions | Claims
        await bus.on(subjects.gateway_all(instance), heard, self._on_message)  # type: ignore[arg-type]  # a union
        await bus.on(subjects.ALIVE_ALL, Heartbeat, self._on_heartbeat)
        await bus.on(subjects.SCALE_ALL, ScaleAdvice, self._on_advice)
        await bus.on_returned(self._on_returned)
        bus.on_reconnect.append(self._on_reconnect)
        self._context.spawn(self._tick(), "tick")
        # A handler whose client went away is cancelled at once: that is how its blocks are freed.
        self._runner = web.AppRunner(
            self._routes.application(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S
        )
        await self._runner.setup()
        if self._settings.listen_fds:
            # Whoever connected while the life before was over waits already, and not for a 503 that no model is known.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEAR_S):
                    await self.model_table.any_known.wait()
        try:
            for site in self._sites(self._runner):
                await site.start()
        except OSError as error:
            where = f"{self._settings.host}:{self._settings.port}"
            raise SettingsError(f"cannot listen on {where}: {error.strerror or error}") from error
        log.info("listening", extra={"port": self.port})

    async def drain(self) -> None:
        """Answer what is running; new requests get a 503."""
        self._is_draining = True
        while len(self.table):
            self._idle.clear()
            await self._idle.wait()

    async def stop(self) -> None:
        """End what is left with an error, so that every client hears of it."""
        self.table.fail_all(Unavailable("this gateway is shutting down", retry_after_s=1.0))
        if self._runner is not None:
            await self._runner.cleanup()

    def models(self) -> list[str]:
        return []

    def is_live(self) -> bool:
        return time.monotonic() - self._ticked_at < LIVE_S

    def stats(self) -> dict[str, float]:
        return totals(self.table.stats) | {
            "requests_running": float(len(self.table)),
            "streams_running": float(self.table.num_streams),
        }

    def snapshot(self) -> KvEvents | None:
        return None

    @property
    def port(self) -> int:
        """The port that HTTP is served on."""
        assert self._runner is not None
        return int(self._runner.addresses[0][1])

    def _sites(self, runner: web.AppRunner) -> list[web.BaseSite]:
        settings = self._settings
        if settings.listen_fds:
            return [web.SockSite(runner, one, backlog=listen.BACKLOG) for one in listen.adopt(settings.listen_fds)]
        return [web.TCPSite(runner, settings.host, settings.port, backlog=listen.BACKLOG)]

    # ---- gateway.app.Ring

    async def ask(self, model: str, query: TokenizeQuery | DetokenizeQuery, expected: type[M]) -> M:
        return await self.bus.ask(subjects.model(model), query, expected, timeout_s=QUERY_TIMEOUT_S)

    def submit(self, answer: Answer, tenant: str) -> None:
        call = answer.call
        if self._is_draining:
            raise Unavailable("this gateway is shutting down", retry_after_s=1.0)
        if len(self.table) + len(call.prompts) > self._settings.max_inflight:
            raise Overloaded(f"more than {self._settings.max_inflight} requests at once", retry_after_s=1.0)
        model = self.model_table.get(call.model)
        answer.reservation = self._quotas.reserve(tenant, call, model.card.max_model_len, time.monotonic())
        for number, prompt in enumerate(call.prompts):
            message = GenerateRequest(
                request_id=uuid.uuid4().hex,
                epoch=0,
                gateway=self._context.instance,
                model=call.model,
                prompt=prompt,
                sampling=call.sampling,
                choices=[],
                cache_salt=tenant,
                tenant=tenant,
                priority=call.priority,
                slo_class=call.slo_class,
                stamps={"gateway": time.time()},
            )
            assemblers = [
                (
                    number * call.n + i,
                    (call.seed + i) % 2**64 if call.seed is not None else secrets.randbits(64),
                    Assembler(
                        model.vocabulary,
                        stop=call.stop,
                        min_tokens=call.sampling.min_tokens,
                        logprobs=call.top_logprobs is not None,
                    ),
                )
                for i in range(call.n)
            ]
            answer.requests.append(self.table.add(message, answer, assemblers, time.monotonic()))
        histories = [request.history for request in answer.requests]
        self._explained.open(answer.response_id, tenant, call.model, histories)

    def release(self, answer: Answer) -> None:
        now = time.monotonic()
        if answer.reservation is not None:
            usage = answer.usage()
            answer.reservation.settle(usage.prompt_tokens + usage.completion_tokens, now)
        for request in answer.requests:
            self.table.drop(request)
            self._observe(answer, request, now)
        self._explained.close(answer.response_id, now, answer.error)
        if not len(self.table):
            self._idle.set()

    def quota_headers(self, tenant: str) -> dict[str, str]:
        return self._quotas.headers(tenant, time.monotonic())

    def explain(self, asked: str, tenant: str) -> dict[str, object]:
        return self._explained.explain(asked, tenant)

    def missing_roles(self) -> list[str]:
        absent = self._absent_roles()
        if time.monotonic() - self._advised_at < ADVISED_S:
            # None is needed before there is a request.
            absent = [role for role in absent if role != "worker"]
        return absent or ([] if self.model_table.cards() else ["model"])

    # ---- the bus

    def _absent_roles(self) -> list[str]:
        return [role for role in _NEEDED if not any(m.state == "ready" for m in self._roster.members(role))]

    def _send(self, message: GenerateRequest | Cancel) -> None:
        if isinstance(message, Cancel):
            subject, reply = subjects.CANCEL, ""
        else:
            subject = subjects.tokenize(message.model)
            instance = self._context.instance
            reply = subjects.returned("gateway", instance, instance, message.request_id, message.epoch)
        try:
            self.bus.send(subject, message, reply=reply)
        except WeftError as error:
            if isinstance(message, GenerateRequest):
                # Not from within the table, which is still at work on this request.
                asyncio.get_running_loop().call_soon(
                    self.table.on_returned, message.request_id, message.epoch, _as_returned(error), time.monotonic()
                )

    def _on_message(self, message: TokenFrame | StreamEvent | Decisions | Claims) -> None:
        now = time.monotonic()
        match message:
            case TokenFrame():
                self.table.on_frame(message, now)
            case Decisions():
                self._explained.on_decisions(message, now)
            case StreamEvent():
                self.table.on_event(message, now)
            case Claims():
                self.table.on_claims(message, now)

    def _on_returned(self, returned: Returned, error: WeftError) -> None:
        self.table.on_returned(returned.request_id, returned.epoch, error, time.monotonic())

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        self._follow(self._roster.apply(beat, time.monotonic()))

    def _on_advice(self, advice: ScaleAdvice) -> None:
        if advice.target is not None:
            self._advised_at = time.monotonic()

    def _follow(self, changes: list[Change]) -> None:
        now = time.monotonic()
        for change in changes:
            member = change.member
            if change.kind == "left":
                log.warning("instance left", extra={"role": member.role, "instance": member.instance})
                self.table.on_left(member.role, member.instance, now)
            elif member.state == "ready":
                self.table.on_joined(now)
                if member.role == "tokenizer" and member.models:
                    self._context.spawn(self.model_table.learn(member.models), "learn models")

    def _on_reconnect(self) -> None:
        now = time.monotonic()
        self._roster.forgive(now)
        self.table.on_reconnect(now)

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            if now - self._ticked_at > 5 * TICK_S:
                # This loop slept through heartbeats and claims that wait in its queues.
                self._on_reconnect()
            elif self.bus.connected:
                self._follow(self._roster.expire(now))
                self.table.tick(now, " and no ".join(self._absent_roles()))
            self._ticked_at = now
            await asyncio.sleep(TICK_S)

    def _observe(self, answer: Answer, request: Request, now: float) -> None:
        model = request.message.model
        finish = answer.error.code if answer.error else "abort"
        reasons = {stream.assembler.finish_reason for stream in request.streams}
        if None not in reasons:
            finish = "length" if "length" in reasons else "stop"
        num_tokens = sum(stream.assembler.num_counted for stream in request.streams)
        metrics = self.metrics
        metrics.requests.labels(model, finish).inc()
        metrics.prompt_tokens.labels(model).inc(request.num_prompt_tokens)
        metrics.prompt_lengths.labels(model).observe(request.num_prompt_tokens)
        metrics.cached_tokens.labels(model).inc(request.num_cached_tokens or 0)
        metrics.completion_tokens.labels(model).inc(num_tokens)
        metrics.e2e.labels(model).observe(now - request.arrived_at)
        ttft = None
        if request.first_token_at is not None:
            ttft = request.first_token_at - request.arrived_at
            metrics.ttft.labels(model).observe(ttft)
            steps = num_tokens / len(request.streams) - 1
            if steps > 0 and request.last_token_at is not None:
                metrics.tpot.labels(model).observe((request.last_token_at - request.first_token_at) / steps)
        log.info(
            "request finished",
            extra={
                "request_id": request.request_id,
                "response_id": answer.response_id,
                "model": model,
                "finish": finish,
                "prompt_tokens": request.num_prompt_tokens,
                "completion_tokens": num_tokens,
                "ttft_s": round(ttft, 4) if ttft is not None else "",
                "e2e_s": round(now - request.arrived_at, 4),
                "epochs": request.epoch + 1,
                **_hop_times(request.message.stamps),
            },
        )


def _hop_times(stamps: Mapping[str, float]) -> dict[str, float]:
    """When each hop handled the request, in seconds after its arrival: which of them was slow?"""
    return {f"{hop}_s": round(at - stamps["gateway"], 4) for hop, at in stamps.items() if hop != "gateway"}


def _as_returned(error: WeftError) -> WeftError:
    """A bus that takes nothing now is a role that is away; a message too large stays the client's fault."""
    return Unavailable(error.message) if isinstance(error, Overloaded) else error
