"""The small pure modules of the contract: columns, hashing, roster, subjects, errors."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft import columns, hashing, subjects
from weft.errors import _BY_CODE, Overloaded, WeftError, from_code
from weft.messages import ErrorInfo, Heartbeat
from weft.roster import Roster

U32 = st.integers(0, 2**32 - 1)


@given(st.lists(U32))
def test_u32_columns_are_little_endian_and_come_back(values: list[int]) -> None:
    packed = columns.pack_u32(values)
    assert packed == b"".join(value.to_bytes(4, "little") for value in values)
    assert columns.unpack_u32(packed) == values


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_f32_columns_come_back(values: list[float]) -> None:
    assert columns.unpack_f32(columns.pack_f32(values)) == values


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_number_that_does_not_fit_a_column_is_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        columns.pack_u32([value])


def test_torn_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        columns.unpack_u32(b"123")
    with pytest.raises(ValueError, match="16-byte"):
        columns.split_hashes(bytes(17))


@given(st.lists(U32, max_size=100), st.integers(1, 20))
def test_a_block_hash_names_the_block_and_all_before_it(tokens: list[int], size: int) -> None:
    root = hashing.chain_root(b"model")
    hashes = hashing.block_hashes(root, columns.pack_u32(tokens), size)
    assert len(hashes) == len(tokens) // size
    parent: bytes = root
    for index, digest in enumerate(hashes):
        data = parent + columns.pack_u32(tokens[index * size : (index + 1) * size])
        parent = hashlib.blake2b(data, digest_size=16).digest()
        assert digest == parent


def test_chains_differ_by_model_adapter_and_salt_unambiguously() -> None:
    roots = {
        hashing.chain_root(b"m"),
        hashing.chain_root(b"m", "a"),
        hashing.chain_root(b"m", "", b"a"),
        hashing.chain_root(b"ma"),
    }
    assert len(roots) == 4


@given(st.text(min_size=1, max_size=100), st.text(min_size=1, max_size=100))
def test_model_tokens_are_subject_safe_and_distinct(one: str, other: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", subjects.model_token(one))
    assert (one == other) == (subjects.model_token(one) == subjects.model_token(other))


def test_returned_subject_reads_back() -> None:
    subject = subjects.returned("tokenizer", "t1", "g1", "r1", 7)
    assert subjects.parse_returned(subject) == subjects.Returned("g1", "r1", 7)


@pytest.mark.parametrize("code", _BY_CODE)
def test_errors_cross_the_bus_by_their_code(code: str) -> None:
    error = from_code(code, "what was wrong", param="field", retry_after_s=1.5)
    back = ErrorInfo.of(error).to_error()
    assert type(back) is type(error)
    assert (back.message, back.param, back.retry_after_s) == ("what was wrong", "field", 1.5)


def test_an_unknown_error_code_is_a_plain_error() -> None:
    assert type(from_code("from the future", "x")) is WeftError
    assert issubclass(Overloaded, WeftError)


def beat(epoch: int = 1, state: str = "ready", instance: str = "w1", models: tuple[str, ...] = ()) -> Heartbeat:
    return Heartbeat("worker", instance, epoch, state, list(models))  # type: ignore[arg-type]


def test_roster_reports_joining_changing_and_leaving() -> None:
    roster = Roster(timeout_s=1.5)
    assert [c.kind for c in roster.apply(beat(state="starting"), 0.0)] == ["joined"]
    assert [c.kind for c in roster.apply(beat(), 0.5)] == ["changed"]
    assert roster.apply(beat(), 1.0) == []
    assert roster.expire(2.5) == []
    assert [(c.kind, c.member.instance) for c in roster.expire(2.6)] == [("left", "w1")]
    assert roster.members("worker") == []


def test_a_dead_heartbeat_ends_only_the_life_it_names() -> None:
    roster = Roster()
    roster.apply(beat(epoch=2), 0.0)
    assert roster.apply(beat(epoch=1, state="dead"), 0.1) == []
    assert [c.kind for c in roster.apply(beat(epoch=2, state="dead"), 0.2)] == ["left"]


def test_a_new_life_ends_the_old_one() -> None:
    roster = Roster()
    roster.apply(beat(epoch=1), 0.0)
    changes = roster.apply(beat(epoch=2), 0.1)
    assert [(c.kind, c.member.epoch) for c in changes] == [("left", 1), ("joined", 2)]
    assert roster.apply(beat(epoch=1), 0.2) == []


def test_silence_is_forgiven_when_the_observer_was_cut_off() -> None:
    roster = Roster(timeout_s=1.5)
    roster.apply(beat(), 0.0)
    roster.forgive(10.0)
    assert roster.expire(11.0) == []
