"""What is made of a worker's settings for its models."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from tests.support.engine_requests import make_settings
from worker_svc.model_options import ModelOptions

CHOSEN = {
    "device": "cuda",
    "dtype": "float16",
    "kernels": "triton",
    "quantize": "int4",
    "threads": 3,
    "kv_memory": 0.5,
}


def test_options_are_the_settings_of_their_names() -> None:
    assert asdict(ModelOptions.of(make_settings(**CHOSEN))) == CHOSEN
    assert ModelOptions.of(make_settings()) == ModelOptions()


def test_options_come_to_other_ranks_as_they_are() -> None:
    for kv_memory in (0.5, 2**40):
        options = ModelOptions.of(make_settings(**{**CHOSEN, "kv_memory": kv_memory}))
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(options), type=ModelOptions) == options
