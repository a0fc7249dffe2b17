"""`weft explain`: a time line as a terminal shows it, and what is said when there is none."""

from __future__ import annotations

import pytest

from weft import cli, explain
from weft.errors import Unavailable

DECISION = {"num_prompt_blocks": 14, "scores": [{"worker": "w2", "matched_blocks": 12, "load": 3, "waiting_tokens": 7}]}


def make_explanation(num_prompts: int = 1, num_left_out: int = 0, why: str = "w2: it was free") -> dict[str, object]:
    timeline = [
        {"event": "received", "at_s": 0.0, "text": ""},
        {"event": "scheduled", "at_s": 0.0021, "text": "w2: it was free", "decision": DECISION},
        {"event": "first_token", "at_s": 1.25, "text": "from w2"},
    ]
    request = {"state": "running", "why": why, "num_left_out": num_left_out, "timeline": timeline}
    requests = [{**request, "request_id": f"r{number}"} for number in range(num_prompts)]
    return {"id": "cmpl-1", "model": "tales", "requests": requests}


def test_time_line_shows_times_words_and_candidates() -> None:
    assert explain.to_text(make_explanation()).splitlines() == [
        "cmpl-1  tales",
        "",
        "  +   0.0000 s  received",
        "  +   0.0021 s  scheduled    w2: it was free",
        "                           w2: 12/14 blocks cached, 3 sequences, 7 tokens to prefill",
        "  +   1.2500 s  first token  from w2",
        "  running: placed on w2: it was free",
    ]


def test_each_prompt_has_its_own_time_line_and_gaps_are_named() -> None:
    text = explain.to_text(make_explanation(2, num_left_out=7, why=""))
    assert "prompt 2 of 2, request r1" in text
    assert text.count("(7 more, from the middle, are left out)") == 2
    assert text.endswith("running: no decision is known\n")


@pytest.mark.parametrize(
    ("events", "why"),
    [(("received", "failed"), "it was never placed"), (("received", "started", "failed"), "no decision is known")],
)
def test_request_that_failed_is_not_said_to_be_placed(events: tuple[str, ...], why: str) -> None:
    timeline = [{"event": event, "at_s": 0.0, "text": ""} for event in events]
    request = {"request_id": "r0", "state": "failed", "why": "", "num_left_out": 0, "timeline": timeline}
    text = explain.to_text({"id": "cmpl-1", "model": "tales", "requests": [request]})
    assert text.endswith(f"failed: {why}\n")


def test_answer_of_something_else_is_named() -> None:
    with pytest.raises(Unavailable, match="cannot be read"):
        explain._read({"requests": [{}], "id": "x", "model": "m"})


def test_without_an_id_the_status_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain"]) == 2
    assert capsys.readouterr().err == "weft explain: which request? Every answer has an `id`: weft explain ID\n"
