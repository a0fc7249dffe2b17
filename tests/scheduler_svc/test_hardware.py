"""A calibration as a file: what it may say, and what is told of one that makes no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from scheduler_svc.cost_model import CostModel
from scheduler_svc.hardware import Hardware, read_cost
from weft.errors import SettingsError

COST = CostModel(overhead_s=0.01, token_s=0.0001, attention_s=1e-9, context_s=1e-7, sequence_s=0.001)
MINE = Hardware("mine", COST, kv_tokens=1000, kv_bytes_per_token=4096)


def test_the_constants_of_a_file_are_those_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(MINE))
    assert read_cost(str(path)) == COST


def test_without_a_file_nothing_is_calibrated() -> None:
    assert read_cost("") is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "Input data was truncated"),
        (b'{"what": "x"}', "Object missing required field `cost`"),
        (
            msgspec.json.encode(MINE).replace(b"0.01", b'"fast"'),
            r"Expected `float`, got `str` - at `\$.cost.overhead_s`",
        ),
        (msgspec.json.encode(MINE).replace(b"token_s", b"tokens_s"), "there is no constant `cost.tokens_s`"),
        (
            msgspec.json.encode(replace(MINE, cost=replace(COST, token_s=-1.0))),
            "`cost.token_s` is no number of seconds",
        ),
        (msgspec.json.encode(replace(MINE, cost=CostModel())), "`cost` says that no work takes any time"),
        (msgspec.json.encode(replace(MINE, kv_tokens=0)), "`kv_tokens` must be at least 1"),
    ],
)
def test_a_bad_file_is_named_with_its_field(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"cost_file: {path} makes no sense: {told}"):
        read_cost(str(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cost_file: .*nowhere.*No such file"):
        read_cost(str(tmp_path / "nowhere"))
