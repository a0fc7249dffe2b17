"""The tokenizer's shell: prompts in, token ids out, and the model's tokenizer for whoever asks.

Short prompts are done between two messages; what takes longer goes to a thread, and the loop goes on. A request is
held only while a thread works on it, and claimed as long.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from tokenizer_svc import chat, encode, prompt
from tokenizer_svc.chat import ChatTemplate
from tokenizer_svc.deadline_threads import DeadlineThreads
from tokenizer_svc.encode import TextTokenizer
from weft import limits, model_folder, subjects
from weft.errors import InvalidRequest, NotFound, Overloaded, PayloadTooLarge, WeftError
from weft.holder import make_claims
from weft.messages import (
    CLAIM_INTERVAL_S,
    ChatPrompt,
    DetokenizeQuery,
    DetokenizeReply,
    ErrorInfo,
    GenerateRequest,
    KvEvents,
    Message,
    ModelCard,
    ModelQuery,
    Prompt,
    StreamEvent,
    TextPrompt,
    TokenizedRequest,
    TokenizeQuery,
    TokenizeReply,
    TokenizerFetch,
    TokenizerPiece,
    TokenPrompt,
)
from weft.model_folder import ModelFolder
from weft.service import Context
from weft.settings import TokenizerSettings
from weft.subjects import Returned
from weft.telemetry import totals

log = logging.getLogger(__name__)
T = TypeVar("T")
Query = ModelQuery | TokenizerFetch | TokenizeQuery | DetokenizeQuery

PIECE_BYTES: Final = 512 * 2**10
# Longer prompts go to a thread: about 2 ms of tokenizing.
MAX_INLINE_CHARS: Final = 8192
MAX_INLINE_TOKENS: Final = 16_384
# What may wait for threads before more is refused.
MAX_HELD_REQUESTS: Final = 4096
MAX_HELD_CHARS: Final = 16 * limits.MAX_MESSAGE_BYTES


@dataclass(slots=True)
class TokenizerCounters:
    """Since start."""

    requests: int = 0
    handed_on: int = 0
    rejected: int = 0
    returned: int = 0
    queries: int = 0
    prompt_tokens: int = 0
    templates_stopped: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """All that is known of the model served."""

    folder: ModelFolder
    digest: bytes
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    created: float


class TokenizerService:
    """One model's tokenizer on the bus."""

    def __init__(self, settings: TokenizerSettings, context: Context) -> None:
        self._settings = settings
        self._context = context
        self._bus = context.bus
        self._instance = context.instance
        self._model: Model | None = None
        self._renderers: DeadlineThreads | None = None
        self._pool = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="encode")
        self._held: dict[asyncio.Task[None], GenerateRequest] = {}
        self._held_chars = 0
        self._counters = TokenizerCounters()

    # ---- life ----

    async def start(self) -> None:
        self._model = await asyncio.to_thread(_load, self._settings)
        self._renderers = DeadlineThreads(self._settings.template_deadline_s)
        name = self._model.folder.name
        await self._bus.on_returned(self._on_returned)
        await self._bus.on(subjects.tokenize(name), GenerateRequest, self._on_request, queue="tokenizer")
        await self._bus.answer(subjects.model(name), Query, self._answer, queue="tokenizer")  # type: ignore[arg-type]  # a union
        self._context.spawn(self._claim(), "claims")

    async def drain(self) -> None:
        if self._model is not None:
            await self._bus.leave(subjects.tokenize(self._model.folder.name))
        while self._held:
            await asyncio.wait(list(self._held))

    async def stop(self) -> None:
        tasks = list(self._held)
        for request in list(self._held.values()):
            self._send_event(request, "lost")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._renderers is not None:
            self._renderers.close()

    def models(self) -> list[str]:
        return [self._model.folder.name] if self._model else []

    def is_live(self) -> bool:
        return self._renderers is None or self._renderers.is_live

    def stats(self) -> dict[str, float]:
        return totals(self._counters) | {
            "held_requests": float(len(self._held)),
            "held_chars": float(self._held_chars),
            "render_threads_given_up": float(self._renderers.num_given_up if self._renderers else 0),
        }

    def snapshot(self) -> KvEvents | None:
        return None

    # ---- requests ----

    def _on_request(self, request: GenerateRequest) -> None:
        self._counters.requests += 1
        if _is_short(request.prompt):
            try:
                self._hand_on(self._finish(request, self._encode(request.prompt)))
            except WeftError as error:
                self._reject(request, error)
        elif len(self._held) >= MAX_HELD_REQUESTS or self._held_chars > MAX_HELD_CHARS:
            self._reject(request, Overloaded("too many long prompts wait to be tokenized", retry_after_s=1.0))
        else:
            self._hold(request)

    def _hold(self, request: GenerateRequest) -> None:
        num_chars = _num_chars(request.prompt)
        self._held_chars += num_chars
        task = asyncio.create_task(self._serve(request), name="long prompt")
        self._held[task] = request

        def let_go(task: asyncio.Task[None]) -> None:
            del self._held[task]
            self._held_chars -= num_chars

        task.add_done_callback(let_go)

    async def _serve(self, request: GenerateRequest) -> None:
        try:
            tokenized = await self._tokenize(request)
        except WeftError as error:
            self._reject(request, error)
        except Exception as error:
            log.exception("tokenizing failed", extra={"request_id": request.request_id})
            self._reject(request, WeftError(f"tokenizing failed: {type(error).__name__}"))
        else:
            self._hand_on(tokenized)

    async def _tokenize(self, request: GenerateRequest) -> TokenizedRequest:
        text = await self._to_text(request.prompt)
        if _is_short(text):
            return self._finish(request, self._encode(text))
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: self._finish(request, self._encode(text))
        )

    async def _to_text(self, given: Prompt) -> TextPrompt | TokenPrompt:
        """Render a conversation in a thread with a deadline; other prompts are ready as they are."""
        if not isinstance(given, ChatPrompt):
            return given
        model, template, renderers = self._served, self._served.template, self._renderers
        assert renderers is not None
        if template is None:
            raise InvalidRequest(f"{model.folder.name} has no chat template; use /v1/completions", param="messages")
        text = await renderers.call(lambda: template.render(given), self._late)
        # The template has written the special tokens.
        return TextPrompt(text, add_special_tokens=False)

    def _late(self) -> WeftError:
        self._counters.templates_stopped += 1
        seconds = self._settings.template_deadline_s
        return InvalidRequest(f"rendering these messages took longer than {seconds:g} s", param="messages")

    def _encode(self, given: Prompt) -> bytes:
        """Token ids of a prompt that is no conversation (any more). Runs on the loop or in a thread."""
        model = self._served
        if isinstance(given, TokenPrompt):
            token_ids = given.token_ids
        else:
            assert isinstance(given, TextPrompt)
            token_ids = model.tokenizer.encode(given.text, add_special_tokens=given.add_special_tokens)
        prompt.check_token_ids(token_ids, model.folder.vocab_size)
        return token_ids

    def _finish(self, request: GenerateRequest, token_ids: bytes) -> TokenizedRequest:
        """Check what only the token ids tell, and hash. Runs on the loop or in a thread."""
        folder = self._served.folder
        if request.model != folder.name:
            raise NotFound(f"this tokenizer serves {folder.name!r}, not {request.model!r}", param="model")
        prompt.check_length(request.prompt, len(token_ids) // 4, request.sampling, folder.max_model_len)
        prompt.check_sampling(request.sampling, folder.vocab_size)
        return prompt.to_tokenized(request, token_ids, self._served.digest, time.time())

    def _hand_on(self, request: TokenizedRequest) -> None:
        hop = (self._instance, request.gateway, request.request_id, request.epoch)
        try:
            self._bus.send(subjects.schedule(request.model), request, reply=subjects.returned("tokenizer", *hop))
        except PayloadTooLarge as error:
            self._reject(request, PayloadTooLarge(error.message, param="prompt"))
        except Overloaded as error:
            self._reject(request, error)
        else:
            self._counters.handed_on += 1
            self._counters.prompt_tokens += request.num_prompt_tokens

    def _reject(self, request: GenerateRequest | TokenizedRequest, error: WeftError) -> None:
        self._counters.rejected += 1
        self._send_event(request, "rejected", ErrorInfo.of(error))

    def _on_returned(self, hop: Returned, error: WeftError) -> None:
        """No scheduler took the request: the gateway decides what becomes of it."""
        self._counters.returned += 1
        self._send_event(hop, "lost", ErrorInfo.of(error))

    # ---- questions ----

    async def _answer(self, query: Query) -> Message:
        self._counters.queries += 1
        model = self._served
        if query.model != model.folder.name:
            raise NotFound(f"this tokenizer serves {model.folder.name!r}, not {query.model!r}", param="model")
        match query:
            case ModelQuery():
                return _card(model)
            case TokenizerFetch():
                return _piece(model.tokenizer, query)
            case TokenizeQuery():
                return await self._tokenize_query(query)
            case DetokenizeQuery():
                return await self._detokenize_query(query)

    async def _tokenize_query(self, query: TokenizeQuery) -> TokenizeReply:
        text = await self._to_text(query.prompt)
        token_ids = await self._in_pool_if(not _is_short(text), lambda: self._encode(text))
        return TokenizeReply(token_ids, self._served.folder.max_model_len)

    async def _detokenize_query(self, query: DetokenizeQuery) -> DetokenizeReply:
        prompt.check_token_ids(query.token_ids, self._served.folder.vocab_size)
        is_long = len(query.token_ids) > 4 * MAX_INLINE_TOKENS
        return DetokenizeReply(await self._in_pool_if(is_long, lambda: self._served.tokenizer.decode(query.token_ids)))

    # ---- news ----

    async def _claim(self) -> None:
        while True:
            await asyncio.sleep(CLAIM_INTERVAL_S)
            for gateway, claims in make_claims("tokenizer", self._instance, self._held.values()):
                self._bus.tell(subjects.events(gateway), claims)

    def _send_event(
        self,
        about: GenerateRequest | TokenizedRequest | Returned,
        kind: Literal["rejected", "lost"],
        error: ErrorInfo | None = None,
    ) -> None:
        event = StreamEvent(about.request_id, about.epoch, kind, "tokenizer", self._instance, error)
        self._bus.tell(subjects.events(about.gateway), event)

    # ---- helpers ----

    @property
    def _served(self) -> Model:
        assert self._model is not None
        return self._model

    async def _in_pool_if(self, is_long: bool, function: Callable[[], T]) -> T:
        if not is_long:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)


def _load(settings: TokenizerSettings) -> Model:
    """Raises SettingsError, which names what the folder lacks."""
    folder = model_folder.read(settings.model)
    return Model(
        folder=folder,
        digest=model_folder.digest(folder),
        tokenizer=encode.load(folder.path),
        template=chat.load(folder.path),
        created=(folder.path / "config.json").stat().st_mtime,
    )


def _card(model: Model) -> ModelCard:
    folder = model.folder
    return ModelCard(
        model=folder.name,
        max_model_len=folder.max_model_len,
        tokenizer_digest=model.tokenizer.digest,
        tokenizer_bytes=len(model.tokenizer.packed),
        created=model.created,
        default_sampling=folder.default_sampling,
    )


def _piece(tokenizer: TextTokenizer, query: TokenizerFetch) -> TokenizerPiece:
    if query.digest != tokenizer.digest:
        raise NotFound("this tokenizer has another tokenizer.json: ask for the model's card again")
    if query.offset >= len(tokenizer.packed):
        raise InvalidRequest(f"the packed tokenizer.json has only {len(tokenizer.packed)} bytes", param="offset")
    return TokenizerPiece(query.offset, tokenizer.packed[query.offset : query.offset + PIECE_BYTES])


def _is_short(given: Prompt) -> bool:
    """True for what may be done between two messages."""
    match given:
        case TextPrompt():
            return len(given.text) <= MAX_INLINE_CHARS
        case TokenPrompt():
            return len(given.token_ids) <= 4 * MAX_INLINE_TOKENS
        case ChatPrompt():
            return False


def _num_chars(given: Prompt) -> int:
    match given:
        case TextPrompt():
            return len(given.text)
        case TokenPrompt():
            return len(given.token_ids)
        case ChatPrompt():
            return sum(len(message.content) for message in given.messages)
