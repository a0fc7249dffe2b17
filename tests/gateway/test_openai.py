"""Requests: what is read from a good body, and that every bad one is an InvalidRequest that names its field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.openai import Call, error_body, parse_chat, parse_completion, parse_detokenize, parse_tokenize
from weft import codec, limits
from weft.columns import unpack_u32
from weft.errors import InvalidRequest, NotFound, Overloaded, PayloadTooLarge, QuotaExceeded, Unauthorized, WeftError
from weft.messages import ChatMessage, ChatPrompt, Choice, GenerateRequest, SamplingParams, TextPrompt, TokenPrompt
from weft.tenants import UNBOUNDED, Tenant

NOW = 1_700_000_000.0
USER = {"role": "user", "content": "Hello"}


def no_defaults(model: str) -> SamplingParams:
    if model != "tales":
        raise NotFound(f"The model '{model}' does not exist.")
    return SamplingParams()


def chat(defaults: Callable[[str], SamplingParams] = no_defaults, tenant: Tenant = UNBOUNDED, **fields: Any) -> Call:
    body = {"model": "tales", "messages": [USER], **fields}
    return parse_chat(json.dumps(body).encode(), now=NOW, defaults=defaults, tenant=tenant)


def completion(
    defaults: Callable[[str], SamplingParams] = no_defaults, tenant: Tenant = UNBOUNDED, **fields: Any
) -> Call:
    body = {"model": "tales", "prompt": "Once", **fields}
    return parse_completion(json.dumps(body).encode(), now=NOW, defaults=defaults, tenant=tenant)


def refusal(parse: Callable[..., object], *args: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(*args, **fields)
    return caught.value


# ---- what is read ----


def test_a_plain_chat_has_openais_defaults() -> None:
    assert chat() == Call(
        is_chat=True,
        model="tales",
        prompts=(ChatPrompt([ChatMessage("user", "Hello")], now=NOW),),
        n=1,
        sampling=SamplingParams(),
        seed=None,
        stop=(),
        stream=False,
        include_usage=False,
        echo=False,
        top_logprobs=None,
    )


def test_a_plain_completion_has_16_tokens() -> None:
    call = completion()
    assert (call.is_chat, call.prompts, call.sampling.max_tokens) == (False, (TextPrompt("Once"),), 16)


EVERY_PARAMETER: dict[str, Any] = {
    "max_completion_tokens": 50,
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 40,
    "min_p": 0.1,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "seed": 7,
    "n": 2,
    "best_of": 2,
    "presence_penalty": -1,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100, "6": 3.5},
    "min_tokens": 3,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "user": "me",
}


@pytest.mark.parametrize("parse", [chat, completion])
def test_every_parameter_is_read(parse: Callable[..., Call]) -> None:
    call = parse(**EVERY_PARAMETER)
    assert call.sampling == SamplingParams(
        max_tokens=50,
        min_tokens=3,
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        presence_penalty=-1.0,
        frequency_penalty=1.5,
        repetition_penalty=1.1,
        logit_bias={5: -100.0, 6: 3.5},
        stop_token_ids=(1, 2),
        ignore_eos=True,
    )
    assert (call.n, call.seed, call.stop) == (2, 7, ("a", "b"))
    assert (call.stream, call.include_usage) == (True, True)


@pytest.mark.parametrize("parse", [chat, completion])
def test_an_explicit_null_means_not_given(parse: Callable[..., Call]) -> None:
    assert parse(**dict.fromkeys([*EVERY_PARAMETER, "max_tokens", "logprobs", "metadata"])) == parse()


def test_a_request_outranks_the_models_defaults_and_they_outrank_openais() -> None:
    base = SamplingParams(temperature=0.6, top_k=20, max_tokens=99, stop_token_ids=(9,), min_tokens=5)
    call = completion(lambda _: base, temperature=0.1)
    assert call.sampling == msgspec.structs.replace(base, temperature=0.1)
    # The model's min_tokens is not the client's fault.
    assert completion(lambda _: base, max_tokens=2).sampling.min_tokens == 2


@pytest.mark.parametrize(("given", "kept"), [(-1, 2**64 - 1), (-(2**63), 2**63), (0, 0), (2**63 - 1, 2**63 - 1)])
def test_any_int64_is_a_seed(given: int, kept: int) -> None:
    assert chat(seed=given).seed == kept


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_of_minus_one_or_zero_is_all(top_k: int) -> None:
    assert chat(lambda _: SamplingParams(top_k=5), top_k=top_k).sampling.top_k == 0


def test_top_p_of_zero_keeps_the_likeliest_token() -> None:
    assert 0 < chat(top_p=0).sampling.top_p < 1e-3


def test_logprobs_of_chats_and_of_completions() -> None:
    assert chat(logprobs=True).top_logprobs == chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3
    assert chat(logprobs=False).top_logprobs is None
    assert completion(logprobs=5).top_logprobs == completion(logprobs=5).sampling.logprobs == 5
    assert completion(logprobs=0).top_logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("", [""]), ("a", ["a"]), (["a", ""], ["a", ""]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_texts_or_token_ids(prompt: Any, texts: list[Any]) -> None:
    prompts = completion(prompt=prompt).prompts
    found = [unpack_u32(one.token_ids) if isinstance(one, TokenPrompt) else one.text for one in prompts]  # type: ignore[union-attr]
    assert found == texts


def test_contents_are_texts_parts_or_an_assistants_nothing() -> None:
    call = chat(
        messages=[
            {"role": "developer", "content": "a", "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
            {"role": "assistant"},
            {"role": "tool", "content": "d", "tool_call_id": "t"},
        ]
    )
    assert call.prompts[0].messages == [  # type: ignore[union-attr]
        ChatMessage("system", "a", "x"),
        ChatMessage("user", "bc"),
        ChatMessage("assistant", ""),
        ChatMessage("assistant", ""),
        ChatMessage("tool", "d"),
    ]


NEUTRAL: dict[str, Any] = {
    "functions": [],
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prompt_logprobs": None,
    "response_format": {"type": "text"},
    "store": False,
    "tool_choice": "auto",
    "tools": [],
    "echo": False,
    "skip_special_tokens": True,
}


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    assert chat(**NEUTRAL) == chat()
    assert completion(suffix=None, best_of=1) == completion()


# ---- classes and priorities ----


@pytest.mark.parametrize(
    ("asked", "slo_class", "priority", "said"),
    [
        ({}, "", 0, None),
        ({"service_tier": None}, "", 0, None),
        ({"service_tier": "auto"}, "", 0, "default"),
        ({"service_tier": "default"}, "", 0, "default"),
        ({"service_tier": "flex"}, "flex", 10, "flex"),
        ({"service_tier": "priority"}, "priority", -10, "priority"),
        ({"service_tier": "fast"}, "priority", -10, "priority"),
        ({"service_tier": "flex", "priority": 3}, "flex", 3, "flex"),
        ({"priority": -1000}, "", -1000, None),
    ],
)
def test_a_tier_is_a_class_and_a_priority(asked: Any, slo_class: str, priority: int, said: str | None) -> None:
    call = chat(**asked)
    assert (call.slo_class, call.priority, call.service_tier) == (slo_class, priority, said)


@pytest.mark.parametrize("tier", [{}, {"service_tier": "auto"}])
def test_a_tenants_own_class_is_what_auto_means(tier: Any) -> None:
    tenant = Tenant(slo_class="priority", earliest_priority=-10)
    call = chat(tenant=tenant, **tier)
    assert (call.slo_class, call.priority) == ("priority", -10)
    assert chat(tenant=tenant, service_tier="default").slo_class == ""


def test_a_tier_beyond_what_a_tenant_may_have_becomes_its_own_and_the_answer_says_so() -> None:
    assert chat(tenant=Tenant(), service_tier="priority") == chat(service_tier="default")
    cheap = chat(tenant=Tenant(slo_class="flex", earliest_priority=10), service_tier="default")
    assert (cheap.slo_class, cheap.priority, cheap.service_tier) == ("flex", 10, "flex")


def test_a_class_does_not_raise_a_priority_above_what_a_tenant_may_have() -> None:
    call = completion(tenant=Tenant(slo_class="priority", earliest_priority=5), service_tier="priority")
    assert (call.slo_class, call.priority) == ("priority", 5)


def test_a_priority_above_what_a_tenant_may_have_is_refused() -> None:
    tenant = Tenant(earliest_priority=-5)
    assert chat(tenant=tenant, priority=-5).priority == -5
    error = refusal(chat, tenant=tenant, priority=-6)
    assert error.param == "priority" and "at least -5" in error.message


# ---- what is refused ----

HUGE = 10**30
BAD: list[tuple[str, Any, str]] = [
    # field, value, param
    ("model", None, "model"),
    ("model", "", "model"),
    ("model", 5, "model"),
    ("model", "x" * 257, "model"),
    *[("max_tokens", value, "max_tokens") for value in (-1, 0, HUGE, 10**9, 1.0, "5", True, [], {})],
    *[("max_completion_tokens", value, "max_completion_tokens") for value in (-1, 0, HUGE, 2.5)],
    *[("temperature", value, "temperature") for value in (-0.1, 2.1, HUGE, -HUGE, "1", True, [1], {})],
    *[("top_p", value, "top_p") for value in (-0.1, 1.1, "x")],
    *[("top_k", value, "top_k") for value in (-2, 2**31, 1.5, False)],
    *[("min_p", value, "min_p") for value in (-1, 2, [])],
    *[("stop", value, "stop") for value in ("", 5, {}, True, ["x"] * 10_000, "x" * 257)],
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a", None], "stop[1]"),
    ("stop", ["a", "x" * 257], "stop[1]"),
    *[("stop_token_ids", value, "stop_token_ids") for value in (5, "a", list(range(65)))],
    *[("stop_token_ids", [1, value], "stop_token_ids[1]") for value in (-1, 2**31, HUGE, 1.0, True, "a", None)],
    *[("seed", value, "seed") for value in (2**64, -(2**63) - 1, HUGE, 1.0, "a", True)],
    *[("n", value, "n") for value in (0, -1, 65, 10**9, HUGE, 1.0, "1", True)],
    ("best_of", 2, "best_of"),
    *[("presence_penalty", value, "presence_penalty") for value in (-2.1, 2.1, "a")],
    *[("frequency_penalty", value, "frequency_penalty") for value in (-2.1, 2.1, True)],
    *[("repetition_penalty", value, "repetition_penalty") for value in (0, -1, 101)],
    *[
        ("logit_bias", value, "logit_bias")
        for value in ([], "a", {"a": 1}, {"-1": 1}, {"1.0": 1}, {str(HUGE): 1}, {"٣": 1})
    ],
    *[("logit_bias", {"7": value}, "logit_bias.7") for value in (-101, 101, HUGE, "1", True, None)],
    ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias"),
    *[("min_tokens", value, "min_tokens") for value in (-1, HUGE, 1.0)],
    *[("ignore_eos", value, "ignore_eos") for value in (1, "true", [])],
    *[("stream", value, "stream") for value in (1, "true", {})],
    ("stream_options", {"include_usage": True}, "stream_options"),
    *[("user", value, "user") for value in (5, "x" * 257, [])],
    ("unheard_of", 1, "unheard_of"),
    ("unheard_of", None, "unheard_of"),
    ("response_format", {"type": "json_object"}, "response_format"),
    *[("service_tier", value, "service_tier") for value in ("scale", "Priority", "", 5)],
    *[("priority", value, "priority") for value in (-1001, 1001, 1.5, "1", True)],
    ("store", True, "store"),
    ("metadata", [], "metadata"),
    ("guided_json", {}, "guided_json"),
    ("skip_special_tokens", 1, "skip_special_tokens"),
]
BAD_CHAT: list[tuple[str, Any, str]] = [
    *[("messages", value, "messages") for value in (None, [], {}, "a", 5, [USER] * 4097)],
    *[("messages", [USER, value], "messages[1]") for value in (None, "a", 5, [])],
    *[("messages", [{"role": value, "content": "a"}], "messages[0].role") for value in (None, "", 5, [], "x" * 257)],
    *[("messages", [{"role": "user", "content": value}], "messages[0].content") for value in (None, 5, {}, True, [])],
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages[0].content[0].x"),
    ("messages", [{**USER, "name": 5}], "messages[0].name"),
    ("messages", [{**USER, "tool_calls": [{}]}], "messages[0].tool_calls"),
    ("messages", [{**USER, "mood": "good"}], "messages[0].mood"),
    ("tools", [{"type": "function"}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("modalities", ["audio"], "modalities"),
    ("reasoning_effort", "high", "reasoning_effort"),
    ("echo", True, "echo"),
    ("top_logprobs", 5, "top_logprobs"),
    *[("logprobs", value, "logprobs") for value in (1, "a")],
]
BAD_COMPLETION: list[tuple[str, Any, str]] = [
    *[("prompt", value, "prompt") for value in (None, [], {}, 5, True, ["a"] * 257)],
    *[("prompt", ["a", value], "prompt[1]") for value in (5, None, {}, [])],
    *[("prompt", [1, value], "prompt[1]") for value in (-1, 2**31, HUGE, 1.5, True, "a", None, [])],
    *[("prompt", [[1], [2, value]], "prompt[1][1]") for value in (-1, 2**31, False, "a")],
    *[("logprobs", value, "logprobs") for value in (-1, 21, 1.0, True)],
    ("suffix", "x", "suffix"),
    ("echo", 1, "echo"),
    ("messages", [USER], "messages"),
]


@pytest.mark.parametrize(("field", "value", "param"), BAD + BAD_CHAT)
def test_a_bad_field_of_a_chat_is_named(field: str, value: Any, param: str) -> None:
    error = refusal(chat, **{field: value})
    assert error.param == param
    assert param in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize(("field", "value", "param"), BAD + BAD_COMPLETION)
def test_a_bad_field_of_a_completion_is_named(field: str, value: Any, param: str) -> None:
    error = refusal(completion, **{field: value})
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"n": 3, "best_of": 5}, "best_of"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(completion, **fields).param == param


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "tales",}', "byte 18"),
        (b'{"temperature": NaN}', "byte 16"),
        (b'{"temperature": Infinity}', "byte 16"),
        (b'{"model": "a"} x', "byte 16"),
        (b'{"n": ' + b"1" * 10_000 + b"}", "out of range"),
        (b'{"model": "\xff"}', "UTF-8 (byte 11)"),
        (b'{"\xc3": 1}', "UTF-8 (byte 2)"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "an array of 0"),
        (b"null", "not null"),
        (b'"text"', '"text"'),
        (b"5", "not 5"),
    ],
)
@pytest.mark.parametrize(
    "parse",
    [
        lambda body: parse_chat(body, now=NOW, defaults=no_defaults),
        lambda body: parse_completion(body, now=NOW, defaults=no_defaults),
        lambda body: parse_tokenize(body, now=NOW),
        parse_detokenize,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(parse: Callable[[bytes], object], body: bytes, words: str) -> None:
    assert words in refusal(parse, body).message


def test_a_number_that_overflows_is_refused_by_name() -> None:
    body = b'{"model": "tales", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}'
    error = refusal(parse_chat, body, now=NOW, defaults=no_defaults)
    assert (error.param, error.http_status) == ("temperature", 400)


def test_an_unknown_model_is_not_found() -> None:
    error = refusal(chat, model="other")
    assert (type(error), error.param) == (NotFound, "model")


def test_a_prompt_of_too_many_tokens_is_too_large() -> None:
    error = refusal(completion, prompt=[1] * (limits.MAX_PROMPT_TOKENS + 1))
    assert (type(error), error.param) == (PayloadTooLarge, "prompt")


# ---- /tokenize, /detokenize ----


def test_tokenize_takes_a_text_or_a_conversation() -> None:
    def parse(**fields: Any) -> object:
        return parse_tokenize(json.dumps({"model": "tales", **fields}).encode(), now=NOW)

    assert parse(prompt="a") == ("tales", TextPrompt("a"))
    assert parse(prompt="", add_special_tokens=False) == ("tales", TextPrompt("", add_special_tokens=False))
    messages = [ChatMessage("user", "Hello")]
    assert parse(messages=[USER]) == ("tales", ChatPrompt(messages, now=NOW))
    assert parse(messages=[USER], add_generation_prompt=False) == ("tales", ChatPrompt(messages, False, NOW))
    assert refusal(parse).param == "prompt"
    assert refusal(parse, prompt=[1]).param == "prompt"
    assert refusal(parse, prompt="a", messages=[USER]).param == "messages"


def test_detokenize_takes_token_ids() -> None:
    def parse(**fields: Any) -> tuple[str, bytes]:
        return parse_detokenize(json.dumps({"model": "tales", **fields}).encode())

    assert parse(tokens=[1, 2]) == ("tales", b"\1\0\0\0\2\0\0\0")
    assert refusal(parse).param == "tokens"
    assert refusal(parse, tokens="a").param == "tokens"
    assert refusal(parse, tokens=[1, -1]).param == "tokens[1]"
    assert refusal(parse, tokens=[1], prompt="a").param == "prompt"


# ---- any bytes at all ----

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-2, 70),
        st.floats(),
        st.floats(0, 1),
        st.text(max_size=5),
        st.sampled_from(["text", "user", "auto", "tales"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5", "x"]), inner, max_size=3),
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    sorted(
        {
            *EVERY_PARAMETER,
            *NEUTRAL,
            "model",
            "messages",
            "prompt",
            "max_tokens",
            "logprobs",
            "top_logprobs",
            "user",
            "x",
        }
    )
)


def check(call: Call) -> None:
    """What was read must be fit for the bus, whose decoder checks every bound."""
    for prompt in call.prompts:
        request = GenerateRequest("r", 0, "g", call.model, prompt, call.sampling, [Choice(0, call.seed or 0)] * call.n)
        assert codec.decode(codec.encode(request), GenerateRequest) == request
    json.dumps(call.stop)


@given(st.dictionaries(NAMES, JSON, max_size=3), st.sampled_from(["messages", "prompt"]))
@example({"logit_bias": {"5": 2, "x": 1}}, "prompt")
def test_any_fields_give_a_call_or_an_invalid_request(fields: dict[str, Any], kind: str) -> None:
    given: dict[str, Any] = {"messages": [USER]} if kind == "messages" else {"prompt": "a"}
    body = json.dumps({"model": "tales", **given, **fields}).encode()
    parse = parse_chat if kind == "messages" else parse_completion
    try:
        check(parse(body, now=NOW, defaults=no_defaults))
    except InvalidRequest as error:
        assert json.loads(error_body(error))["error"]["message"] == error.message


GOOD_BODIES = [
    json.dumps({"model": "tales", "messages": [USER], **EVERY_PARAMETER}).encode(),
    json.dumps({"model": "tales", "prompt": [[1, 2], [3]], "logprobs": 2, "tokens": [1]}).encode(),
]


@given(st.sampled_from(GOOD_BODIES), st.lists(st.tuples(st.integers(0, 600), st.binary(max_size=3)), max_size=4))
def test_any_mutation_gives_a_call_or_an_invalid_request(body: bytes, edits: list[tuple[int, bytes]]) -> None:
    for at, new in edits:
        body = body[:at] + new + body[at + 1 :]
    parse_anyhow(body)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_call_or_an_invalid_request(body: bytes) -> None:
    parse_anyhow(body)


def parse_anyhow(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            check(parse(body, now=NOW, defaults=no_defaults))
        except InvalidRequest as error:
            error_body(error)
    for parse_other in (lambda body: parse_tokenize(body, now=NOW), parse_detokenize):
        try:
            parse_other(body)
        except InvalidRequest as error:
            error_body(error)


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "type_", "param", "code"),
    [
        (InvalidRequest("m", param="n"), "invalid_request_error", "n", None),
        (NotFound("m", param="model"), "invalid_request_error", "model", "model_not_found"),
        (NotFound("m"), "invalid_request_error", None, None),
        (PayloadTooLarge("m"), "invalid_request_error", None, "payload_too_large"),
        (Unauthorized("m"), "authentication_error", None, "invalid_api_key"),
        (Overloaded("m"), "rate_limit_error", None, "overloaded"),
        (QuotaExceeded("m"), "rate_limit_error", None, "rate_limit_exceeded"),
        (WeftError("m"), "server_error", None, "internal_error"),
    ],
)
def test_errors_have_openais_envelope(error: WeftError, type_: str, param: str | None, code: str | None) -> None:
    assert json.loads(error_body(error)) == {"error": {"message": "m", "type": type_, "param": param, "code": code}}


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_a_literal_that_json_does_not_have_is_refused_by_its_fields_name(literal: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(
            b'{"model": "m", "temperature": ' + literal.encode() + b"}", now=0.0, defaults=lambda _: SamplingParams()
        )
    assert caught.value.param == "temperature"


def test_one_call_cannot_ask_for_more_streams_than_the_limit() -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=["a"] * 200, n=64)
    assert caught.value.param == "n"
