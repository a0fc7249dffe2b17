"""Answers, judged by the types of OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.assembler import Delta, TokenLogprob
from gateway.openai import Call
from gateway.responses import ChunkWriter, Finished, Usage, model_body, models_body, whole
from weft.errors import WorkerLost
from weft.messages import ModelCard, SamplingParams, TextPrompt

CREATED = 1_700_000_000
LOGPROBS = (
    TokenLogprob(b" a", -0.5, ((b" a", -0.5), (b"b", -1.5)), 0),
    TokenLogprob(b"\xe2\x82", float("-inf"), ((b"b", -0.1),), 2),
)


def make_call(*, is_chat: bool = True, **fields: Any) -> Call:
    defaults: dict[str, Any] = {
        "is_chat": is_chat,
        "model": 'ta"les""',
        "prompts": (TextPrompt("a"),),
        "n": 1,
        "sampling": SamplingParams(),
        "seed": None,
        "stop": (),
        "stream": True,
        "include_usage": False,
        "echo": False,
        "top_logprobs": None,
    }
    return Call(**(defaults | fields))


def make_writer(**fields: Any) -> ChunkWriter:
    return ChunkWriter(make_call(**fields), "id-1", CREATED)


def read_event(event: bytes) -> dict[str, Any]:
    """One event's JSON, read as a client reads lines."""
    assert event.startswith(b'data: {"id":')
    assert event.endswith(b"\n\n")
    assert len(event.decode().splitlines()) == 2
    body = json.loads(event[len(b"data: ") :])
    assert isinstance(body, dict)
    return body


def chat_chunk(event: bytes) -> ChatCompletionChunk:
    return ChatCompletionChunk.model_validate(read_event(event), strict=True)


def text_chunk(event: bytes) -> Completion:
    # The client's type wants a finish reason, which OpenAI leaves null in all chunks but the last.
    body = read_event(event)
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    return Completion.model_validate(body, strict=True)


def test_a_chat_begins_with_the_role() -> None:
    chunk = chat_chunk(make_writer().first(1))
    assert (chunk.id, chunk.object, chunk.created, chunk.model) == (
        "id-1",
        "chat.completion.chunk",
        CREATED,
        'ta"les""',
    )
    assert chunk.choices[0].index == 1
    assert chunk.choices[0].delta.model_dump(exclude_unset=True) == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }


def test_a_completion_begins_with_its_text() -> None:
    assert make_writer(is_chat=False).first(0) == b""


@given(st.text(), st.integers(0, 300), st.booleans())
def test_text_chunks_carry_any_text(text: str, choice: int, include_usage: bool) -> None:
    text += '\u2028\u2029\x85\r\n"\\'
    chat = chat_chunk(make_writer(include_usage=include_usage).delta(choice, Delta(text)))
    assert (chat.choices[0].index, chat.choices[0].delta.content, chat.choices[0].finish_reason) == (choice, text, None)
    plain = text_chunk(make_writer(is_chat=False, include_usage=include_usage).delta(choice, Delta(text)))
    assert (plain.object, plain.choices[0].index, plain.choices[0].text) == ("text_completion", choice, text)


@pytest.mark.parametrize("include_usage", [True, False])
def test_every_chunk_says_null_for_usage_only_if_usage_will_come(include_usage: bool) -> None:
    writer = make_writer(include_usage=include_usage)
    for event in (writer.first(0), writer.delta(0, Delta("a")), writer.delta(0, Delta("a", "stop"))):
        assert ("usage" in read_event(event)) == include_usage


def test_a_delta_that_says_nothing_is_no_event() -> None:
    assert make_writer().delta(0, Delta("")) == b""


def test_the_last_chunk_says_why_it_ended() -> None:
    chat = chat_chunk(make_writer().delta(2, Delta("", "length")))
    assert (chat.choices[0].index, chat.choices[0].delta.content, chat.choices[0].finish_reason) == (2, None, "length")
    plain = text_chunk(make_writer(is_chat=False).delta(2, Delta("end", "length")))
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("end", "length")


def test_chat_chunks_carry_logprobs() -> None:
    logprobs = chat_chunk(make_writer(top_logprobs=2).delta(0, Delta(" a", None, LOGPROBS))).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.model_dump() == {
        "content": [
            {
                "token": " a",
                "bytes": [32, 97],
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": " a", "bytes": [32, 97], "logprob": -0.5},
                    {"token": "b", "bytes": [98], "logprob": -1.5},
                ],
            },
            {
                "token": "\\xe2\\x82",
                "bytes": [0xE2, 0x82],
                "logprob": -9999.0,
                "top_logprobs": [{"token": "b", "bytes": [98], "logprob": -0.1}],
            },
        ],
        "refusal": None,
    }


COMPLETION_LOGPROBS = {
    "tokens": [" a", "\\xe2\\x82"],
    "token_logprobs": [-0.5, -9999.0],
    # The sampled token is there even if it is not among the likeliest.
    "top_logprobs": [{" a": -0.5, "b": -1.5}, {"b": -0.1, "\\xe2\\x82": -9999.0}],
    "text_offset": [0, 2],
}


def test_completion_chunks_carry_logprobs() -> None:
    event = make_writer(is_chat=False, top_logprobs=2).delta(0, Delta(" a", "stop", LOGPROBS))
    logprobs = text_chunk(event).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.model_dump() == COMPLETION_LOGPROBS


def test_usage_comes_in_a_chunk_of_its_own_if_asked_for() -> None:
    assert make_writer().usage(Usage(1, 2, 0)) == b""
    chunk = chat_chunk(make_writer(include_usage=True).usage(Usage(10, 5, 8)))
    assert (chunk.choices, chunk.usage is not None) == ([], True)
    assert read_event(make_writer(is_chat=False, include_usage=True).usage(Usage(10, 5, 8)))["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 8},
    }


def test_a_stream_ends_with_done_or_an_error() -> None:
    writer = make_writer()
    assert writer.done() == b"data: [DONE]\n\n"
    event = writer.error(WorkerLost("gone\u2028"))
    assert event.startswith(b'data: {"error":')
    assert len(event.decode().splitlines()) == 2
    assert json.loads(event[6:])["error"]["code"] == "worker_lost"


def test_a_whole_chat_is_a_chat_completion() -> None:
    call = make_call(stream=False, n=2, top_logprobs=2)
    body = whole(call, "id-1", CREATED, [Finished("é\n", "stop", LOGPROBS), Finished("", "length")], Usage(3, 4, 2))
    answer = ChatCompletion.model_validate_json(body, strict=True)
    assert (answer.id, answer.object, answer.created, answer.model) == ("id-1", "chat.completion", CREATED, call.model)
    first, second = answer.choices
    assert (first.index, first.message.role, first.message.content, first.finish_reason) == (
        0,
        "assistant",
        "é\n",
        "stop",
    )
    assert (second.index, second.message.content, second.finish_reason) == (1, "", "length")
    assert first.logprobs is not None
    assert [one.token for one in first.logprobs.content or []] == [" a", "\\xe2\\x82"]
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (7, 2)  # type: ignore[union-attr]
    assert json.loads(body)["choices"][0]["message"]["refusal"] is None


def test_a_whole_completion_is_a_text_completion() -> None:
    call = make_call(is_chat=False, stream=False, top_logprobs=2)
    body = whole(call, "id-1", CREATED, [Finished("x", "stop", LOGPROBS)], Usage(3, 4, 0))
    answer = Completion.model_validate_json(body, strict=True)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == ("text_completion", "x", "stop")
    assert json.loads(body)["choices"][0]["logprobs"] == COMPLETION_LOGPROBS


def test_without_being_asked_an_answer_has_no_logprobs() -> None:
    for is_chat in (True, False):
        body = whole(make_call(is_chat=is_chat), "id-1", CREATED, [Finished("x", "stop")], Usage(3, 4, 0))
        assert json.loads(body)["choices"][0]["logprobs"] is None


def test_models_are_listed_as_openai_lists_them() -> None:
    card = ModelCard("tales", 2048, bytes(16), 100, CREATED + 0.5, SamplingParams())
    listed = json.loads(models_body([card, card]))
    assert (listed["object"], len(listed["data"])) == ("list", 2)
    assert listed["data"][0] == json.loads(model_body(card))
    model = Model.model_validate_json(model_body(card), strict=True)
    assert (model.id, model.object, model.created, model.owned_by) == ("tales", "model", CREATED, "weft")
    assert json.loads(model_body(card))["max_model_len"] == 2048


@pytest.mark.parametrize("tier", [None, "default", "flex", "priority"])
def test_a_chat_says_its_tier_if_it_was_asked_for_one(tier: str | None) -> None:
    chunk = chat_chunk(make_writer(service_tier=tier).delta(0, Delta("a", None)))
    body = whole(make_call(service_tier=tier), "id-1", CREATED, [Finished("a", "stop")], Usage(1, 1, 0))
    assert chunk.service_tier == ChatCompletion.model_validate_json(body).service_tier == tier
    assert (b"service_tier" in body) == (tier is not None)


def test_a_completion_has_no_tier_to_say() -> None:
    call = make_call(is_chat=False, service_tier="flex")
    assert b"service_tier" not in whole(call, "id-1", CREATED, [Finished("a", "stop")], Usage(1, 1, 0))
