"""OpenAI's requests, and the little of vLLM's beyond them: bytes in, a checked `Call` out. Pure.

Whatever a client may send ends as a `Call` or as an `InvalidRequest` that names the field. Fields that we know but do
not implement are accepted only where they ask for nothing (`_NEUTRAL`).
Source: OpenAI API reference (Chat, Completions); vLLM "Extra Parameters" of the same routes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec

from gateway.fields import Accepted, Fields, decode_object, invalid, is_number
from gateway.prompts import check_token_ids, pack_token_ids, read_messages, read_prompts
from gateway.tier import read_priority, read_slo_class
from weft import limits
from weft.errors import InvalidRequest, NotFound, WeftError
from weft.messages import ChatPrompt, Prompt, SamplingParams, TextPrompt
from weft.tenants import UNBOUNDED, Tenant

Defaults: TypeAlias = Callable[[str], SamplingParams]

COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for /v1/completions


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call, checked: what to generate and how to answer."""

    is_chat: bool
    model: str
    prompts: tuple[Prompt, ...]
    # Choices of each prompt; choice i of prompt p has the index p * n + i.
    n: int
    sampling: SamplingParams
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    # None = no logprobs in the answer; 0 = of the sampled token only.
    top_logprobs: int | None
    priority: int = 0  # lower is earlier, where schedulers order by it
    slo_class: str = ""  # "flex", "priority", or the default
    service_tier: str | None = None  # as served, which a call hears only if it gave one


def parse_chat(body: bytes, *, now: float, defaults: Defaults, tenant: Tenant = UNBOUNDED) -> Call:
    """Read the body of /v1/chat/completions, which `tenant` sent; `defaults` gives a model's sampling parameters.

    Raises:
        InvalidRequest: `param` names the field at fault.
        NotFound: `defaults` does not know the model.
    """
    fields = Fields(decode_object(body))
    model, base = _model(fields, defaults)
    messages = read_messages(fields)
    add_generation_prompt = fields.boolean("add_generation_prompt") is not False
    top_logprobs = fields.integer("top_logprobs", 0, limits.MAX_TOP_LOGPROBS)
    if fields.boolean("logprobs"):
        top_logprobs = top_logprobs or 0
    elif top_logprobs is not None:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    call = _call(
        fields,
        base,
        is_chat=True,
        model=model,
        prompts=(ChatPrompt(messages, add_generation_prompt, now),),
        top_logprobs=top_logprobs,
        echo=False,
        max_tokens=_max_tokens(fields, base.max_tokens),
        tenant=tenant,
    )
    fields.refuse_rest(_NEUTRAL_IN_CHAT)
    return call


def parse_completion(body: bytes, *, now: float, defaults: Defaults, tenant: Tenant = UNBOUNDED) -> Call:
    """Read the body of /v1/completions. Raises as `parse_chat` does."""
    fields = Fields(decode_object(body))
    model, base = _model(fields, defaults)
    prompts = read_prompts(fields)
    top_logprobs = fields.integer("logprobs", 0, limits.MAX_TOP_LOGPROBS)
    echo = bool(fields.boolean("echo"))
    if echo and top_logprobs is not None:
        raise InvalidRequest("'echo' together with 'logprobs' is not supported.", param="logprobs")
    call = _call(
        fields,
        base,
        is_chat=False,
        model=model,
        prompts=prompts,
        top_logprobs=top_logprobs,
        echo=echo,
        max_tokens=_max_tokens(fields, base.max_tokens or COMPLETION_MAX_TOKENS),
        tenant=tenant,
    )
    fields.refuse_rest(_NEUTRAL_IN_COMPLETIONS)
    return call


def parse_tokenize(body: bytes, *, now: float) -> tuple[str, Prompt]:
    """Read the body of /tokenize: the model, and a text ("prompt") or a conversation ("messages").

    Raises:
        InvalidRequest: `param` names the field at fault.
    """
    fields = Fields(decode_object(body))
    model = fields.name("model", limits.MAX_NAME_CHARS)
    text = fields.string("prompt", limits.MAX_MESSAGE_BYTES)
    prompt: Prompt
    if text is not None:
        prompt = TextPrompt(text, fields.boolean("add_special_tokens") is not False)
    else:
        if "messages" not in fields:
            raise InvalidRequest("Missing required parameter: 'prompt' or 'messages'.", param="prompt")
        prompt = ChatPrompt(read_messages(fields), fields.boolean("add_generation_prompt") is not False, now)
    fields.refuse_rest({"continue_final_message": (False,), "return_token_strs": (False,)})
    return model, prompt


def parse_detokenize(body: bytes) -> tuple[str, bytes]:
    """Read the body of /detokenize: the model and its "tokens", as a uint32 column.

    Raises:
        InvalidRequest: `param` names the field at fault.
    """
    fields = Fields(decode_object(body))
    model = fields.name("model", limits.MAX_NAME_CHARS)
    token_ids = fields.array("tokens", limits.MAX_PROMPT_TOKENS)
    if token_ids is None:
        raise fields.missing("tokens")
    fields.refuse_rest({})
    return model, pack_token_ids("tokens", token_ids)


def error_body(error: WeftError) -> bytes:
    """OpenAI's error envelope."""
    code: str | None = error.code
    if isinstance(error, NotFound):
        code = "model_not_found" if error.param == "model" else None
    elif type(error) is InvalidRequest:
        code = None
    envelope = {"message": error.message, "type": error.openai_type, "param": error.param, "code": code}
    return msgspec.json.encode({"error": envelope})


def _model(fields: Fields, defaults: Defaults) -> tuple[str, SamplingParams]:
    model = fields.name("model", limits.MAX_NAME_CHARS)
    try:
        return model, defaults(model)
    except NotFound as error:
        raise NotFound(error.message, param="model") from error


def _call(
    fields: Fields,
    base: SamplingParams,
    *,
    is_chat: bool,
    model: str,
    prompts: tuple[Prompt, ...],
    top_logprobs: int | None,
    echo: bool,
    max_tokens: int | None,
    tenant: Tenant,
) -> Call:
    """Read the fields that both routes have."""
    n = fields.integer("n", 1, limits.MAX_CHOICES) or 1
    if n * len(prompts) > limits.MAX_STREAMS:
        raise InvalidRequest(
            f"{len(prompts)} prompts times 'n' ({n}) are more than {limits.MAX_STREAMS} completions.", param="n"
        )
    best_of = fields.integer("best_of", 1, limits.MAX_CHOICES)
    if best_of not in (None, n):
        raise InvalidRequest(f"'best_of' ({best_of}) must equal 'n' ({n}).", param="best_of")
    # Names the client's own customer: nothing here depends on it.
    fields.string("user", limits.MAX_NAME_CHARS)
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    stream = bool(fields.boolean("stream"))
    slo_class, service_tier = read_slo_class(fields, tenant)
    return Call(
        is_chat=is_chat,
        model=model,
        prompts=prompts,
        n=n,
        sampling=_sampling(fields, base, max_tokens, top_logprobs),
        seed=None if seed is None else seed % 2**64,
        stop=_stop(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        echo=echo,
        top_logprobs=top_logprobs,
        priority=read_priority(fields, tenant, slo_class),
        slo_class=slo_class,
        service_tier=service_tier,
    )


def _max_tokens(fields: Fields, default: int | None) -> int | None:
    old = fields.integer("max_tokens", 1, limits.MAX_PROMPT_TOKENS)
    new = fields.integer("max_completion_tokens", 1, limits.MAX_PROMPT_TOKENS)
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ; give one of them.",
            param="max_completion_tokens",
        )
    return new or old or default


def _sampling(fields: Fields, base: SamplingParams, max_tokens: int | None, top_logprobs: int | None) -> SamplingParams:
    """What the request says, over what `base` says."""
    top_p = fields.number("top_p", 0, 1)
    repetition_penalty = fields.number("repetition_penalty", 0, 100)
    if repetition_penalty == 0:
        raise invalid("repetition_penalty", "a number above 0", 0)
    top_k = fields.integer("top_k", -1, limits.MAX_TOKEN_ID)
    min_tokens = fields.integer("min_tokens", 0, limits.MAX_PROMPT_TOKENS)
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({min_tokens}) must not be greater than the maximum of {max_tokens} tokens.",
            param="min_tokens",
        )
    given: dict[str, Any] = {
        "min_tokens": min_tokens,
        "temperature": fields.number("temperature", 0, 2),
        # OpenAI takes 0; its meaning, the likeliest token alone, is what any tiny number means.
        "top_p": 1e-6 if top_p == 0 else top_p,
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": repetition_penalty,
        "logit_bias": _logit_bias(fields),
        "stop_token_ids": _stop_token_ids(fields),
        "ignore_eos": fields.boolean("ignore_eos"),
    }
    sampling = msgspec.structs.replace(
        base,
        max_tokens=max_tokens,
        logprobs=top_logprobs,
        **{name: value for name, value in given.items() if value is not None},
    )
    if max_tokens is not None and sampling.min_tokens > max_tokens:  # the model's default, not the client's fault
        sampling = msgspec.structs.replace(sampling, min_tokens=max_tokens)
    return sampling


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    given = fields.mapping("logit_bias", limits.MAX_LOGIT_BIAS)
    if given is None:
        return None
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not re.fullmatch("0|[1-9][0-9]{0,9}", key) or int(key) > limits.MAX_TOKEN_ID:
            raise invalid("logit_bias", "token ids as keys", key)
        if not is_number(bias, -100, 100):
            raise invalid(f"logit_bias.{key}", "a number from -100 to 100", bias)
        biases[int(key)] = float(bias)  # type: ignore[arg-type]  # is_number said so
    return biases


def _stop_token_ids(fields: Fields) -> tuple[int, ...] | None:
    token_ids = fields.array("stop_token_ids", limits.MAX_STOP_TOKEN_IDS)
    if token_ids is None:
        return None
    check_token_ids("stop_token_ids", token_ids)
    return tuple(token_ids)  # type: ignore[arg-type]  # just checked


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list):
        raise invalid("stop", "a string or an array of strings", value)
    if len(stops) > limits.MAX_STOP_STRINGS:
        raise invalid("stop", f"at most {limits.MAX_STOP_STRINGS} strings", stops)
    for i, stop in enumerate(stops):
        name = "stop" if isinstance(value, str) else f"stop[{i}]"
        if not isinstance(stop, str):
            raise invalid(name, "a string", stop)
        if not stop:
            raise invalid(name, "a string that is not empty", stop)
        if len(stop) > limits.MAX_STOP_STRING_CHARS:
            raise invalid(name, f"at most {limits.MAX_STOP_STRING_CHARS} characters", stop)
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.mapping("stream_options", 16)
    if given is None:
        return False
    if not stream:
        raise InvalidRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is true.", param="stream_options"
        )
    options = Fields(given, "stream_options.")
    include_usage = bool(options.boolean("include_usage"))
    options.refuse_rest({"include_obfuscation": bool, "continuous_usage_stats": (False,)})
    return include_usage


# What these fields may say without changing the answer; anything else is refused as not supported.
_NEUTRAL: Final[dict[str, Accepted]] = {
    # OpenAI
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_processors": ([],),
    "metadata": dict,
    "prompt_cache_key": str,
    "safety_identifier": str,
    "store": (False,),
    # vLLM
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_NEUTRAL_IN_CHAT: Final[dict[str, Accepted]] = _NEUTRAL | {
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": bool,
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # Chat templates write the date or special tokens themselves.
    "add_special_tokens": (False,),
}
_NEUTRAL_IN_COMPLETIONS: Final[dict[str, Accepted]] = _NEUTRAL | {"suffix": ("",)}
