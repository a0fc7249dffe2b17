"""What a worker refuses to give to its engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support.ring import make_request
from weft.columns import pack_u32
from weft.errors import InvalidRequest, NotFound
from weft.messages import Choice, SamplingParams, TokenizedRequest
from worker_svc.checks import check_request


def check(request: TokenizedRequest) -> None:
    check_request(request, model="tales-6m", vocab_size=100, max_model_len=40)


def changed(**fields: Any) -> TokenizedRequest:
    return msgspec.structs.replace(make_request(prompt=range(20), max_tokens=20), **fields)


def test_a_request_that_just_fits_passes() -> None:
    check(changed())
    check(changed(sampling=SamplingParams(), choices=[Choice(0, 0, pack_u32(range(20)))]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_token_ids": b"", "block_hashes": b""}, "prompt"),
        ({"prompt_token_ids": b"12345"}, "prompt"),
        ({"prompt_token_ids": pack_u32([100] * 20)}, "prompt"),
        ({"choices": [Choice(0, 0, pack_u32([100]))]}, "prompt"),
        ({"block_hashes": b""}, "prompt"),
        ({"block_hashes": bytes(32)}, "prompt"),
        ({"choices": [Choice(0, 0), Choice(0, 1)]}, "n"),
        ({"sampling": SamplingParams(max_tokens=21)}, "max_tokens"),
        ({"sampling": SamplingParams(), "choices": [Choice(0, 0, pack_u32(range(21)))]}, "max_tokens"),
        ({"sampling": SamplingParams(max_tokens=1, logit_bias={100: 1.0})}, "logit_bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_the_engine_cannot_take_is_an_invalid_request(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(changed(**fields))
    assert caught.value.param == param


def test_another_model_is_not_found() -> None:
    with pytest.raises(NotFound):
        check(changed(model="other"))
