"""What is checked of a prompt's ids, and what is handed on."""

from __future__ import annotations

import pytest

from tokenizer_svc.prompt import check_length, check_sampling, check_token_ids, to_tokenized
from weft.columns import pack_u32
from weft.errors import ContextLengthExceeded, InvalidRequest
from weft.hashing import block_hashes, chain_root
from weft.messages import (
    ChatMessage,
    ChatPrompt,
    Choice,
    ErrorInfo,
    GenerateRequest,
    SamplingParams,
    TextPrompt,
)

CHAT = ChatPrompt([ChatMessage("user", "hi")])
TEXT = TextPrompt("hi")


def test_first_id_that_the_model_does_not_have_is_named_with_its_index() -> None:
    check_token_ids(pack_u32([0, 99]), 100)
    with pytest.raises(InvalidRequest, match="token id 100 at index 2 .* size of 100") as caught:
        check_token_ids(pack_u32([0, 99, 100, 4_000_000_000]), 100)
    assert caught.value.param == "prompt"


def test_column_of_broken_length_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        check_token_ids(b"abc", 100)


@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(99, None), (100, 0), (60, 40), (1, None)])
def test_prompt_that_leaves_room_passes(num_tokens: int, max_tokens: int | None) -> None:
    check_length(TEXT, num_tokens, SamplingParams(max_tokens=max_tokens), 100)


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "words"),
    [
        (100, None, "requested 101 tokens (100 in the prompt, 1 for the completion)"),
        (61, 40, "requested 101 tokens (61 in the prompt, 40 for the completion)"),
        (101, 0, "requested 101 tokens (101 in the prompt, 0 for the completion)"),
    ],
)
def test_prompt_over_the_context_is_refused_with_both_numbers(
    num_tokens: int, max_tokens: int | None, words: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        check_length(CHAT, num_tokens, SamplingParams(max_tokens=max_tokens), 100)
    assert "maximum context length is 100 tokens" in caught.value.message
    assert words in caught.value.message
    assert (caught.value.param, caught.value.http_status) == ("messages", 400)
    again = ErrorInfo.of(caught.value).to_error()
    assert isinstance(again, ContextLengthExceeded) and again.code == "context_length_exceeded"


@pytest.mark.parametrize(("prompt", "param"), [(CHAT, "messages"), (TEXT, "prompt")])
def test_empty_prompt_is_refused(prompt: ChatPrompt | TextPrompt, param: str) -> None:
    with pytest.raises(InvalidRequest, match="empty") as caught:
        check_length(prompt, 0, SamplingParams(), 100)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "sampling", [SamplingParams(logit_bias={3: 1.0, 100: 1.0}), SamplingParams(stop_token_ids=(100,))]
)
def test_sampling_that_names_an_unknown_token_is_refused(sampling: SamplingParams) -> None:
    check_sampling(sampling, 101)
    with pytest.raises(InvalidRequest, match="token 100"):
        check_sampling(sampling, 100)


def test_everything_of_the_request_is_handed_on() -> None:
    choices = [Choice(7, 1, pack_u32([5])), Choice(8, 2)]
    known = {"tenant": "ann", "priority": -3, "slo_class": "flex", "yield_epoch": 2, "stamps": {"gateway": 1.0}}
    request = GenerateRequest("r1", 3, "g1", "m", TEXT, SamplingParams(max_tokens=9), choices, "salt", **known)
    tokens = pack_u32(range(40))
    done = to_tokenized(request, tokens, b"digest", 2.0)
    assert (done.request_id, done.epoch, done.gateway, done.model) == ("r1", 3, "g1", "m")
    assert (done.sampling, done.choices) == (request.sampling, choices)
    assert done.cache_salt == "salt"
    assert (done.tenant, done.priority, done.slo_class, done.yield_epoch) == ("ann", -3, "flex", 2)
    assert done.stamps == {"gateway": 1.0, "tokenizer": 2.0}
    assert done.prompt_token_ids == tokens
    assert done.block_hashes == b"".join(block_hashes(chain_root(b"digest", "salt"), tokens))
    assert len(done.block_hashes) == 2 * 16
