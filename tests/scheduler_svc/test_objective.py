"""Objectives as a setting: what is read, and that every mistake is named."""

from __future__ import annotations

import pytest

from scheduler_svc.objective import parse_objectives, strictest_ttft_s
from scheduler_svc.policy.admit import Objectives
from weft.errors import SettingsError

INF = float("inf")


@pytest.mark.parametrize(
    ("text", "objectives"),
    [
        ("", {}),
        ("ttft=2,tbt=0.2", {"": Objectives(2.0, 0.2)}),
        ("default: tbt=0.2;", {"": Objectives(INF, 0.2)}),
        (
            " ttft = 2 ; priority: ttft=0.5 , tbt=0.1; flex:ttft=60",
            {"": Objectives(2.0), "priority": Objectives(0.5, 0.1), "flex": Objectives(60.0)},
        ),
    ],
)
def test_classes_have_objectives(text: str, objectives: dict[str, Objectives]) -> None:
    assert parse_objectives(text) == objectives


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gold:ttft=1", "slo: in 'gold:ttft=1', there is no class 'gold'; there are default, priority, flex"),
        (":ttft=1", "slo: in ':ttft=1', there is no class ''; there are default, priority, flex"),
        ("ttft=1; default:tbt=1", "slo: in 'default:tbt=1', the class 'default' is there already"),
        ("itl=1", "slo: in 'itl=1', 'itl' is none of ttft, tbt, as in ttft=2,tbt=0.2"),
        ("flex:", "slo: in 'flex:', '' is none of ttft, tbt, as in ttft=2,tbt=0.2"),
        ("ttft=1,ttft=2", "slo: in 'ttft=1,ttft=2', 'ttft' is there twice"),
        *[(f"tbt={x}", f"slo: in 'tbt={x}', '{x}' is no number of seconds above 0") for x in ("0", "-1", "inf", "2s")],
    ],
)
def test_a_mistake_is_named(text: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_objectives(text)
    assert caught.value.message == sentence


@pytest.mark.parametrize(
    ("text", "ttft_s"), [("", INF), ("tbt=0.2", INF), ("ttft=2", 2.0), ("ttft=2; priority:ttft=0.5; flex:tbt=1", 0.5)]
)
def test_the_strictest_promise_of_a_first_token_is_that_of_any_class(text: str, ttft_s: float) -> None:
    assert strictest_ttft_s(parse_objectives(text)) == ttft_s
