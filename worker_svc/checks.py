"""A request once more against the model that will serve it: what the edge checked, a worker does not believe. Pure."""

from __future__ import annotations

from typing import Final

from weft.columns import unpack_u32
from weft.errors import InvalidRequest, NotFound
from weft.hashing import BLOCK_SIZE, HASH_BYTES
from weft.messages import TokenizedRequest

_TOKEN_BYTES: Final = 4


def check_request(request: TokenizedRequest, *, model: str, vocab_size: int, max_model_len: int) -> None:
    """Check everything that the engine relies on.

    Raises:
        NotFound: another model is meant.
        InvalidRequest: names the field.
    """
    if request.model != model:
        raise NotFound(f"this worker serves {model!r}, not {request.model!r}", param="model")
    for column in (request.prompt_token_ids, *[choice.emitted for choice in request.choices]):
        _check_tokens(column, vocab_size)
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    _check_length(request, max_model_len)
    if len(request.block_hashes) != request.num_prompt_tokens // BLOCK_SIZE * HASH_BYTES:
        raise InvalidRequest("block hashes and prompt differ in length", param="prompt")
    if len({choice.slot for choice in request.choices}) != len(request.choices):
        raise InvalidRequest("two choices have the same slot", param="n")
    if any(token_id >= vocab_size for token_id in request.sampling.logit_bias):
        raise InvalidRequest(f"logit_bias names a token over the vocabulary of {vocab_size}", param="logit_bias")


def _check_tokens(column: bytes, vocab_size: int) -> None:
    if len(column) % _TOKEN_BYTES:
        raise InvalidRequest("token ids are no whole number of uint32", param="prompt")
    highest = max(unpack_u32(column), default=0)
    if highest >= vocab_size:
        raise InvalidRequest(f"token id {highest} is over the vocabulary of {vocab_size}", param="prompt")


def _check_length(request: TokenizedRequest, max_model_len: int) -> None:
    prompt, completion = request.num_prompt_tokens, request.sampling.max_tokens
    if completion is None:
        # As far as the context goes; there must be room for what was emitted, or for a first token.
        completion = max(1, *[len(choice.emitted) // _TOKEN_BYTES for choice in request.choices])
    if prompt + completion > max_model_len:
        raise InvalidRequest(
            f"{prompt} prompt tokens and {completion} new ones are more than the context of {max_model_len}",
            param="max_tokens",
        )
