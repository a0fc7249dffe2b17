"""From a prompt's token ids to the request that is handed on: checks and block hashes. Pure."""

from __future__ import annotations

from weft.columns import unpack_u32
from weft.errors import ContextLengthExceeded, InvalidRequest
from weft.hashing import block_hashes, chain_root
from weft.messages import ChatPrompt, GenerateRequest, Prompt, SamplingParams, TextPrompt, TokenizedRequest


def check_token_ids(token_ids: bytes, vocab_size: int) -> None:
    """Raises InvalidRequest, which names the first id that the model does not have, and its index."""
    if len(token_ids) % 4:
        raise InvalidRequest("token ids are no whole number of uint32", param="prompt")
    ids = unpack_u32(token_ids)
    if ids and max(ids) >= vocab_size:
        index = next(index for index, token_id in enumerate(ids) if token_id >= vocab_size)
        raise InvalidRequest(
            f"token id {ids[index]} at index {index} is not below the vocabulary's size of {vocab_size}", param="prompt"
        )


def check_length(prompt: Prompt, num_tokens: int, sampling: SamplingParams, max_model_len: int) -> None:
    """Raises InvalidRequest if the prompt is empty, ContextLengthExceeded if it leaves no room for the completion."""
    param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    # What a tokenizer puts before every text is no prompt.
    if not num_tokens or (isinstance(prompt, TextPrompt) and not prompt.text):
        raise InvalidRequest("the prompt is empty", param=param)
    completion = 1 if sampling.max_tokens is None else sampling.max_tokens
    if num_tokens + completion > max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens, however you requested "
            f"{num_tokens + completion} tokens ({num_tokens} in the prompt, {completion} for the completion). "
            "Please reduce the length of the prompt or of the completion.",
            param=param,
        )


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest, which names the field, if a token is named that the model does not have."""
    named = {"logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
    for param, token_ids in named.items():
        if token_ids and max(token_ids) >= vocab_size:
            raise InvalidRequest(
                f"{param} names token {max(token_ids)}, which is not below the vocabulary's size of {vocab_size}",
                param=param,
            )


def to_tokenized(request: GenerateRequest, token_ids: bytes, model_digest: bytes, now: float) -> TokenizedRequest:
    """Hop 2; `now` is `time.time()`."""
    root = chain_root(model_digest, request.cache_salt)
    return TokenizedRequest(
        request_id=request.request_id,
        epoch=request.epoch,
        gateway=request.gateway,
        model=request.model,
        prompt_token_ids=token_ids,
        block_hashes=b"".join(block_hashes(root, token_ids)),
        sampling=request.sampling,
        choices=request.choices,
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        priority=request.priority,
        slo_class=request.slo_class,
        yield_epoch=request.yield_epoch,
        stamps={**request.stamps, "tokenizer": now},
    )
