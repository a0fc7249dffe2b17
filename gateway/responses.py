"""OpenAI's answers: a choice's deltas to server-sent events, or to one JSON body. Pure.

A chunk with nothing but text, which is nearly every one, is a prefix made once, the text as JSON, and a suffix.
Source: OpenAI API reference (the chat completion, chat completion chunk, completion and model objects).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gateway.assembler import Delta, TokenLogprob
from gateway.detokenize import bytes_to_text
from gateway.openai import Call, error_body
from weft.errors import WeftError
from weft.messages import ModelCard

OWNER: Final = "weft"
# What OpenAI says for a token that is all but impossible: JSON has no minus infinity.
MIN_LOGPROB: Final = -9999.0

# An empty text in an event: where any other text goes.
_MARK: Final = b'""'

_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """One choice of an answer that is sent as a whole."""

    text: str
    finish_reason: str
    logprobs: Sequence[TokenLogprob] = ()


class ChunkWriter:
    """The events of one streamed call; every chunk begins with `data: {"id":`."""

    def __init__(self, call: Call, response_id: str, created: int) -> None:
        self._is_chat = call.is_chat
        self._has_logprobs = call.top_logprobs is not None
        self._include_usage = call.include_usage
        kind = "chat.completion.chunk" if call.is_chat else "text_completion"
        self._head = _head(call, response_id, created, kind)
        self._prefixes: dict[int, bytes] = {}
        self._suffix = self._text_suffix()

    def first(self, choice: int) -> bytes:
        """What comes before a choice's first text: in a chat, its role."""
        if not self._is_chat:
            return b""
        return self._chunk(choice, {"delta": {"role": "assistant", "content": "", "refusal": None}}, None, None)

    def delta(self, choice: int, delta: Delta) -> bytes:
        """One event; b"" if the delta says nothing."""
        if delta.finish_reason is None and not delta.logprobs:
            if not delta.text:
                return b""
            prefix = self._prefixes.get(choice) or self._text_prefix(choice)
            return prefix + _quote(delta.text) + self._suffix
        logprobs = _logprobs(self._is_chat, delta.logprobs) if self._has_logprobs and delta.logprobs else None
        return self._chunk(choice, self._body(delta.text), logprobs, delta.finish_reason)

    def usage(self, usage: Usage) -> bytes:
        """The chunk that says what was used; b"" if the client did not ask."""
        if not self._include_usage:
            return b""
        return _event({**self._head, "choices": [], "usage": _usage(usage)})

    def done(self) -> bytes:
        return b"data: [DONE]\n\n"

    def error(self, error: WeftError) -> bytes:
        return b"data: " + _escape_lines(error_body(error)) + b"\n\n"

    def _chunk(
        self, choice: int, body: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> bytes:
        choices = [{"index": choice, **body, "logprobs": logprobs, "finish_reason": finish_reason}]
        return _event({**self._head, "choices": choices, **({"usage": None} if self._include_usage else {})})

    def _body(self, text: str) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    def _text_prefix(self, choice: int) -> bytes:
        """An event's bytes before the text; together with `_suffix`, what `_chunk` makes of the same."""
        event = self._text_event(choice)
        prefix = self._prefixes[choice] = event[: event.rindex(_MARK)]
        return prefix

    def _text_suffix(self) -> bytes:
        event = self._text_event(0)
        return event[event.rindex(_MARK) + len(_MARK) :]

    def _text_event(self, choice: int) -> bytes:
        body: dict[str, Any] = {"delta": {"content": ""}} if self._is_chat else {"text": ""}
        return self._chunk(choice, body, None, None)


def whole(call: Call, response_id: str, created: int, choices: Sequence[Finished], usage: Usage) -> bytes:
    """The body of an answer that is not streamed."""
    body = {
        **_head(call, response_id, created, "chat.completion" if call.is_chat else "text_completion"),
        "choices": [_choice(call, index, choice) for index, choice in enumerate(choices)],
        "usage": _usage(usage),
    }
    return _encode(body)


def models_body(cards: Sequence[ModelCard]) -> bytes:
    return _encode({"object": "list", "data": [_model(card) for card in cards]})


def model_body(card: ModelCard) -> bytes:
    return _encode(_model(card))


def _head(call: Call, response_id: str, created: int, kind: str) -> dict[str, Any]:
    head = {"id": response_id, "object": kind, "created": created, "model": call.model, "system_fingerprint": None}
    # OpenAI has it in chats only, and only for those who gave one.
    return head | {"service_tier": call.service_tier} if call.is_chat and call.service_tier else head


def _choice(call: Call, index: int, choice: Finished) -> dict[str, Any]:
    body: dict[str, Any]
    if call.is_chat:
        body = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
    else:
        body = {"text": choice.text}
    logprobs = None if call.top_logprobs is None else _logprobs(call.is_chat, choice.logprobs)
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _logprobs(is_chat: bool, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    if is_chat:
        content = [
            {**_chat_logprob(one.data, one.logprob), "top_logprobs": [_chat_logprob(*top) for top in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [bytes_to_text(one.data) for one in logprobs],
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        # The sampled token is there even if it is not among the likeliest.
        "top_logprobs": [
            {bytes_to_text(data): _finite(logprob) for data, logprob in (*one.top, (one.data, one.logprob))}
            for one in logprobs
        ],
        "text_offset": [one.text_offset for one in logprobs],
    }


def _chat_logprob(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": bytes_to_text(data), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return MIN_LOGPROB if math.isnan(logprob) else max(logprob, MIN_LOGPROB)


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model,
        "object": "model",
        "created": int(card.created),
        "owned_by": OWNER,
        "max_model_len": card.max_model_len,
    }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + _escape_lines(_encode(body)) + b"\n\n"


def _quote(text: str) -> bytes:
    data = _encode(text)
    return data if text.isascii() else _escape_lines(data)


def _escape_lines(data: bytes) -> bytes:
    """Escape what JSON leaves alone and many an SSE reader takes for the end of a line: NEL, LS and PS."""
    if data.isascii():
        return data
    return (
        data.replace(b"\xc2\x85", b"\\u0085").replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    )
