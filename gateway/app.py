"""HTTP in, server-sent events out: the routes of the OpenAI API, and a few of our own."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias, TypeVar

import msgspec
from aiohttp import HttpVersion11, web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from gateway import openai, responses
from gateway.answer import Answer
from gateway.auth import ApiKeys
from gateway.metrics import Metrics
from gateway.models import ModelTable
from weft.columns import unpack_u32
from weft.errors import InvalidRequest, NotFound, Overloaded, PayloadTooLarge, Unavailable, WeftError
from weft.messages import (
    DetokenizeQuery,
    DetokenizeReply,
    SamplingParams,
    TextPrompt,
    TokenizeQuery,
    TokenizeReply,
    TokenPrompt,
)
from weft.settings import GatewaySettings
from weft.tenants import Tenants

log = logging.getLogger(__name__)
M = TypeVar("M")
BODY_TIMEOUT_S: Final = 60.0
LARGE_BODY_BYTES: Final = 128 * 1024
Parser: TypeAlias = Callable[..., openai.Call]
_OPEN_ROUTES: Final = ("/health", "/ready")
_JSON: Final = "application/json"


class Ring(Protocol):
    """What the routes need of the service behind them."""

    model_table: ModelTable
    metrics: Metrics
    registry: CollectorRegistry
    tenants: Tenants

    async def ask(self, model: str, query: TokenizeQuery | DetokenizeQuery, expected: type[M]) -> M:
        """Ask a tokenizer of this model. Raises what it answers, Unavailable or DeadlineExceeded."""

    def submit(self, answer: Answer, tenant: str) -> None:
        """Send the call's prompts into the ring.

        Raises:
            Overloaded: too many are held, or the tenant has used up its quota.
            Unavailable: this gateway drains.
        """

    def release(self, answer: Answer) -> None:
        """Nobody reads this answer any more."""

    def quota_headers(self, tenant: str) -> dict[str, str]:
        """What is left of the tenant's quota; empty if it has none."""

    def explain(self, asked: str, tenant: str) -> dict[str, object]:
        """The time line of a call of this tenant, by an id of it. Raises NotFound."""

    def missing_roles(self) -> list[str]:
        """Roles without which no request can be served."""

    def is_live(self) -> bool: ...


class Routes:
    """The handlers, and what they share."""

    def __init__(self, ring: Ring, settings: GatewaySettings, keys: ApiKeys) -> None:
        self._ring = ring
        self._settings = settings
        self._keys = keys

    def application(self) -> web.Application:
        app = web.Application(client_max_size=self._settings.max_body_size, middlewares=[self._middleware])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.get("/v1/requests/{id}/explain", self._explain),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/health", self._health),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Keys, errors in OpenAI's envelope, and the count of answers."""
        try:
            if request.path not in _OPEN_ROUTES:
                request["tenant"] = self._keys.tenant_of(request.headers.get("Authorization"))
            response = await handler(request)
        except WeftError as error:
            response = _error_response(error)
            if isinstance(error, Overloaded):
                response.headers.update(self._ring.quota_headers(request["tenant"]))
            if "response_id" in request:
                response.headers["X-Request-Id"] = request["response_id"]
        except web.HTTPRequestEntityTooLarge:
            response = _error_response(
                PayloadTooLarge(f"the body is larger than {self._settings.max_body_size} bytes"), close=True
            )
        except web.HTTPException as error:
            response = _error_response(NotFound(f"no route {request.method} {request.path}"), status=error.status)
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = error.headers["Allow"]
        except (asyncio.CancelledError, ConnectionError):
            self._count(request, 499)
            raise
        except Exception:
            log.exception("request handler failed", extra={"route": request.path})
            response = _error_response(WeftError("the gateway failed; its log says why"))
        self._count(request, response.status)
        return response

    def _count(self, request: web.Request, status: int) -> None:
        resource = request.match_info.route.resource
        self._ring.metrics.http.labels(resource.canonical if resource else "unknown", str(status)).inc()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, await self._parsed(request, openai.parse_chat))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, await self._parsed(request, openai.parse_completion))

    async def _generate(self, request: web.Request, call: openai.Call) -> web.StreamResponse:
        prefix = "chatcmpl-" if call.is_chat else "cmpl-"
        answer = Answer(call, prefix + uuid.uuid4().hex, int(time.time()), asyncio.get_running_loop())
        if call.echo:
            answer.echo(self._prompt_texts(call))
        self._ring.submit(answer, request["tenant"])
        # An error has no body with an id that `explain` could be asked for.
        request["response_id"] = answer.response_id
        try:
            await answer.first
            if answer.error is not None and not self._has_begun(answer):
                raise answer.error
            if call.stream:
                return await self._stream(request, answer)
            await answer.ended
            if answer.error is not None:
                raise answer.error
            body = responses.whole(call, answer.response_id, answer.created, answer.finished(), answer.usage())
            return web.Response(body=body, content_type=_JSON, headers=self._headers(request, answer))
        finally:
            self._ring.release(answer)

    def _headers(self, request: web.Request, answer: Answer) -> dict[str, str]:
        return {"X-Request-Id": answer.response_id, **self._ring.quota_headers(request["tenant"])}

    @staticmethod
    def _has_begun(answer: Answer) -> bool:
        """Whether tokens came before the error."""
        return any(request.first_token_at is not None for request in answer.requests)

    async def _stream(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **self._headers(request, answer),
            }
        )
        chunked = request.version >= HttpVersion11
        if chunked:
            response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            await self._write_events(request, response, answer, chunked)
        except Exception as error:
            if not isinstance(error, ConnectionError):
                # The answer has begun: an error page now would be read as part of it.
                log.exception("stream failed", extra={"request_id": answer.response_id})
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the stream broke off") from error
        return response

    async def _write_events(
        self, request: web.Request, response: web.StreamResponse, answer: Answer, chunked: bool
    ) -> None:
        # aiohttp sends the headers with the first write, which therefore goes through it.
        await response.write(answer.take_pending() or b": \n\n")
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away")
        limit = self._settings.slow_reader_size

        def write(events: bytes) -> None:
            if transport.is_closing():
                return
            transport.write(b"%x\r\n%b\r\n" % (len(events), events) if chunked else events)
            if transport.get_write_buffer_size() > limit:
                log.warning("slow reader cut off", extra={"request_id": answer.response_id})
                transport.abort()

        answer.attach(write)
        try:
            await answer.ended
        finally:
            answer.detach()
        await response.write(answer.closing_events())
        await response.write_eof()

    def _prompt_texts(self, call: openai.Call) -> list[str]:
        texts = []
        for prompt in call.prompts:
            if isinstance(prompt, TextPrompt):
                texts.append(prompt.text)
            elif isinstance(prompt, TokenPrompt):
                texts.append(self._ring.model_table.get(call.model).vocabulary.decode(unpack_u32(prompt.token_ids)))
        return texts

    async def _models(self, request: web.Request) -> web.Response:
        return web.Response(body=responses.models_body(self._ring.model_table.cards()), content_type=_JSON)

    async def _model(self, request: web.Request) -> web.Response:
        card = self._ring.model_table.get(request.match_info["model"]).card
        return web.Response(body=responses.model_body(card), content_type=_JSON)

    async def _explain(self, request: web.Request) -> web.Response:
        return _json_response(self._ring.explain(request.match_info["id"], request["tenant"]))

    async def _tokenize(self, request: web.Request) -> web.Response:
        model, prompt = openai.parse_tokenize(await self._body(request), now=time.time())
        self._ring.model_table.get(model)
        reply = await self._ring.ask(model, TokenizeQuery(model, prompt), TokenizeReply)
        tokens = unpack_u32(reply.token_ids)
        return _json_response({"count": len(tokens), "max_model_len": reply.max_model_len, "tokens": tokens})

    async def _detokenize(self, request: web.Request) -> web.Response:
        model, token_ids = openai.parse_detokenize(await self._body(request))
        self._ring.model_table.get(model)
        reply = await self._ring.ask(model, DetokenizeQuery(model, token_ids), DetokenizeReply)
        return _json_response({"prompt": reply.text})

    async def _health(self, request: web.Request) -> web.Response:
        """Liveness: of this process alone, whatever the rest of the mesh does."""
        live = self._ring.is_live()
        return _json_response({"status": "ok" if live else "stuck"}, status=200 if live else 503)

    async def _ready(self, request: web.Request) -> web.Response:
        """Readiness: could a request be served now?"""
        missing = self._ring.missing_roles()
        if not missing:
            return _json_response(
                {"status": "ready", "models": [card.model for card in self._ring.model_table.cards()]}
            )
        return _json_response({"status": "not ready", "missing": missing}, status=503)

    async def _metrics(self, request: web.Request) -> web.Response:
        body = generate_latest(self._ring.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _body(self, request: web.Request) -> bytes:
        length = request.content_length
        if length is not None and length > self._settings.max_body_size:
            # Refused by its announced size: not a byte of it is read.
            raise web.HTTPRequestEntityTooLarge(self._settings.max_body_size, length)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await request.read()
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
        except web.RequestPayloadError as error:
            raise InvalidRequest("the body is not what its Content-Encoding says") from error

    async def _parsed(self, request: web.Request, parse: Parser) -> openai.Call:
        body = await self._body(request)
        tenant = self._ring.tenants.of(request["tenant"])
        read = functools.partial(parse, body, now=time.time(), defaults=self._defaults, tenant=tenant)
        # A million token ids take 0.2 s, for which no stream should wait.
        return await asyncio.to_thread(read) if len(body) > LARGE_BODY_BYTES else read()

    def _defaults(self, model: str) -> SamplingParams:
        return self._ring.model_table.get(model).card.default_sampling


def _json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type=_JSON)


def _error_response(error: WeftError, *, status: int | None = None, close: bool = False) -> web.Response:
    response = web.Response(
        body=openai.error_body(error), status=status or error.http_status, content_type=_JSON, headers=_retry(error)
    )
    if close or isinstance(error, PayloadTooLarge):
        response.force_close()
    return response


def _retry(error: WeftError) -> dict[str, str]:
    if error.retry_after_s is None and not isinstance(error, Overloaded | Unavailable):
        return {}
    # Rounded up: whoever comes back to the second should not be too early.
    return {"Retry-After": str(max(1, math.ceil(error.retry_after_s or 1.0)))}
