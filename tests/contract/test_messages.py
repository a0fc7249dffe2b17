"""The wire, judged by the independent `msgpack` package and by committed bytes.

`python -m tests.contract.test_messages` rewrites golden.json: only for a change of the contract that is meant.
"""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import typing
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.samples import SAMPLES, TOKENIZED
from weft import codec, limits, messages
from weft.errors import DecodeError, PayloadTooLarge

GOLDEN = Path(__file__).parent / "golden.json"
TYPES: list[Any] = list(typing.get_args(messages.Message))


def test_every_message_type_has_a_sample() -> None:
    assert {type(sample) for sample in SAMPLES.values()} == set(TYPES)


def test_type_numbers_are_unique() -> None:
    tags = [cls.__struct_config__.tag for cls in TYPES]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("name", SAMPLES)
def test_message_encodes_to_its_golden_bytes(name: str) -> None:
    assert codec.encode(SAMPLES[name]).hex() == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_golden_bytes_decode_to_the_message(name: str) -> None:
    data = bytes.fromhex(json.loads(GOLDEN.read_text())[name])
    assert codec.decode(data, type(SAMPLES[name])) == SAMPLES[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_msgpack_package_reads_every_field(name: str) -> None:
    message = SAMPLES[name]
    read = msgpack.unpackb(codec.encode(message), strict_map_key=False)
    fields = msgspec.to_builtins(message, builtin_types=(bytes,), str_keys=False)
    assert read == _listed(fields)
    assert read["t"] == type(message).__struct_config__.tag
    assert read["v"] == messages.VERSION


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_written_by_msgpack_package_decode(name: str) -> None:
    message = SAMPLES[name]
    fields = msgspec.to_builtins(message, builtin_types=(bytes,), str_keys=False)
    assert codec.decode(msgpack.packb(fields), type(message)) == message


@pytest.mark.parametrize("name", SAMPLES)
def test_other_version_type_or_field_is_refused(name: str) -> None:
    message = SAMPLES[name]
    fields = msgpack.unpackb(codec.encode(message), strict_map_key=False)
    for change in ({"v": 2}, {"t": 999}, {"surprise": 1}):
        with pytest.raises(DecodeError):
            codec.decode(msgpack.packb({**fields, **change}), type(message))


def test_one_type_is_not_taken_for_another() -> None:
    with pytest.raises(DecodeError, match="Heartbeat"):
        codec.decode(codec.encode(SAMPLES["Cancel"]), messages.Heartbeat)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"max_tokens": -1},
        {"max_tokens": 10**9},
        {"logprobs": 21},
        {"min_p": float("inf")},
        {"logit_bias": dict.fromkeys(range(limits.MAX_LOGIT_BIAS + 1), 0.0)},
        {"stop_token_ids": list(range(limits.MAX_STOP_TOKEN_IDS + 1))},
    ],
)
def test_sampling_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    fields = msgpack.unpackb(codec.encode(TOKENIZED), strict_map_key=False)
    fields["sampling"].update(change)
    with pytest.raises(DecodeError):
        codec.decode(msgpack.packb(fields), messages.TokenizedRequest)


@pytest.mark.parametrize("column", ["slots", "epochs", "first_indices", "counts", "finishes", "token_ids"])
def test_frame_with_a_column_of_another_length_is_refused(column: str) -> None:
    fields = msgpack.unpackb(codec.encode(SAMPLES["TokenFrame"]), strict_map_key=False)
    fields[column] += b"\0"
    with pytest.raises(DecodeError):
        codec.decode(msgpack.packb(fields), messages.TokenFrame)


def test_cancel_of_choices_with_other_choices_lengths_is_refused() -> None:
    fields = msgpack.unpackb(codec.encode(SAMPLES["Cancel"]), strict_map_key=False)
    fields["num_output_tokens"] += b"\0\0\0\0"
    with pytest.raises(DecodeError):
        codec.decode(msgpack.packb(fields), messages.Cancel)


def test_message_over_the_size_limit_is_refused_on_both_sides() -> None:
    data = messages.BlockData(b"", [], b"")
    blocks = [bytes(2**20)] * 9
    big = messages.BlockData(bytes(16) * 9, blocks, bytes(4) * 9)
    assert codec.decode(codec.encode(data), messages.BlockData) == data
    with pytest.raises(PayloadTooLarge):
        codec.encode(big)
    with pytest.raises(DecodeError):
        codec.decode(bytes(limits.MAX_MESSAGE_BYTES + 1), messages.BlockData)


def _mutated(data: bytes) -> st.SearchStrategy[bytes]:
    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        raw = bytearray(data)
        for start, length, new in edits:
            at = start % (len(raw) + 1)
            raw[at : at + length] = new
        return bytes(raw)

    edit = st.tuples(st.integers(0, 10_000), st.integers(0, 8), st.binary(max_size=8))
    return st.lists(edit, min_size=1, max_size=4).map(apply)


@settings(max_examples=400, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=300), st.sampled_from([codec.encode(s) for s in SAMPLES.values()]).flatmap(_mutated)
    )
)
def test_hostile_bytes_give_a_message_or_a_decode_error(data: bytes) -> None:
    for cls in TYPES:
        with contextlib.suppress(DecodeError):
            assert isinstance(codec.decode(data, cls), cls)


@pytest.mark.parametrize(
    "tail",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1t" * 100_000,
    ],
    ids=["array of 4G", "map of 4G", "bin of 4G", "str of 4G", "deep arrays", "deep maps"],
)
def test_announced_sizes_are_not_allocated(tail: bytes) -> None:
    tracemalloc.start()
    for cls in TYPES:
        for head in (b"", b"\x82\xa1t" + msgpack.packb(cls.__struct_config__.tag) + b"\xa4keys"):
            with pytest.raises(DecodeError):
                codec.decode(head + tail, cls)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def _listed(value: Any) -> Any:
    """msgpack knows lists only; defaults that are tuples read back as lists."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({name: codec.encode(sample).hex() for name, sample in SAMPLES.items()}, indent=1) + "\n"
    )
