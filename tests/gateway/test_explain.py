"""Time lines of requests: what they say, who may read them, and that they are bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.explain import MAX_ENTRIES, MAX_WHY_CHARS, Book, History, sentence
from tests.support.request_table import World
from weft import messages as m
from weft.errors import InvalidRequest, NotFound, Unavailable

STAMPS = {"gateway": 100.0, "tokenizer": 100.001, "scheduler": 100.002, "started": 100.01}


def make_decision(worker: str = "w2", held: int = 12, load: int = 3, **changes: object) -> m.Decision:
    scores = (m.Score(worker, load, 0, held), m.Score("w9", 1, 0, 0))
    known = {"num_candidates": 4, "least_load": 1, "num_prompt_blocks": 14, "scores": scores, "rule": "longest match"}
    return m.Decision(**{"worker": worker, "policy": "prefix_aware", **known, **changes})  # type: ignore[arg-type]


def make_decisions(*workers: str, request_id: str = "r1") -> m.Decisions:
    placed = [
        m.Placed(request_id, epoch, 230, {**STAMPS, "scheduler": 100.002 + epoch}, make_decision(worker))
        for epoch, worker in enumerate(workers)
    ]
    return m.Decisions("s1", placed)


def make_event(kind: str, epoch: int = 0, **more: object) -> m.StreamEvent:
    return m.StreamEvent("r1", epoch, kind, "worker", "w2", stamps=STAMPS, **more)  # type: ignore[arg-type]


def opened(book: Book, *request_ids: str, tenant: str = "") -> list[History]:
    histories = [History(request_id, 0.0) for request_id in request_ids]
    book.open(f"cmpl-{request_ids[0]}", tenant, "tales", histories)
    return histories


def events(book: Book, asked: str = "cmpl-r1", tenant: str = "") -> list[str]:
    return [entry["event"] for entry in book.explain(asked, tenant)["requests"][0]["timeline"]]


def test_sentence_says_what_the_worker_holds_and_how_loaded_it_and_the_idlest_are() -> None:
    assert sentence(make_decision()) == (
        "w2: prefix_aware, longest match: holds 12 of 14 prompt blocks; 3 sequences there, 1 on the least loaded of 4"
    )


def test_sentence_says_what_was_passed_over_and_what_was_planned() -> None:
    scores = (m.Score("w1", 1, 0, 0), m.Score("w2", 9, 0, 14))
    text = sentence(make_decision("w1", scores=scores, rule="unbalanced", expected_ttft_s=0.25, stop_after=1))
    assert "unbalanced: holds none of 14 prompt blocks, w2 14; 1 sequence there" in text
    assert text.endswith("first token expected within 0.25 s; to be handed back after 1 token")
    assert "expected" not in sentence(make_decision(expected_ttft_s=0.0)), "nobody has measured anything yet"
    assert sentence(make_decision(num_candidates=1, scores=scores[:1])).endswith("the only worker with room")


def test_time_line_is_in_the_order_of_its_times_whatever_comes_late() -> None:
    book = Book(10)
    (history,) = opened(book, "r1")
    history.on_news(make_event("started", num_prompt_tokens=230, num_cached_tokens=192), 0.012)
    history.note("first_token", 0.02, 0, instance="w2")
    history.note("done", 0.03, 0, num_output_tokens=8)
    book.close("cmpl-r1", 0.031)
    book.on_decisions(make_decisions("w2"), 0.08)
    assert events(book) == ["received", "tokenized", "scheduled", "started", "first_token", "done"]
    (request,) = book.explain("r1", "")["requests"]
    assert [entry["at_s"] for entry in request["timeline"]] == pytest.approx([0, 0.001, 0.002, 0.01, 0.02, 0.03])
    assert request["timeline"][3]["text"] == "w2: 192 of 230 prompt tokens found in caches"
    assert (request["state"], request["why"]) == ("done", sentence(make_decision()))


def test_request_that_moved_says_from_where() -> None:
    book = Book(10)
    opened(book, "r1")
    book.on_decisions(make_decisions("w1", "w2"), 2.0)
    texts = [entry["text"] for entry in book.explain("r1", "")["requests"][0]["timeline"]]
    assert texts[-1].endswith("; moved from w1")
    assert "moved" not in texts[-2]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (m.BacklogPlace(5, 4, "bounded", "fcfs"), "none of 4 workers has room; admitted by bounded, number 5"),
        (m.BacklogPlace(5, 4, "open", "srpt"), "one of 5 in the backlog, in the order of srpt"),
        (m.BacklogPlace(1, 0, "bounded", "fcfs"), "no worker is there"),
    ],
)
def test_queued_says_why_and_where(place: m.BacklogPlace, words: str) -> None:
    book = Book(10)
    opened(book, "r1")[0].on_news(make_event("queued", place=place), 0.5)
    entry = book.explain("r1", "")["requests"][0]["timeline"][-1]
    assert words in entry["text"]
    assert entry["at_s"] == 0.5


def test_chunks_and_preemptions_are_told_with_their_tokens() -> None:
    book = Book(10)
    (history,) = opened(book, "r1")
    history.on_news(make_event("prefill", num_chunks=8, num_computed_tokens=2048), 0.5)
    history.on_news(make_event("preempted", num_computed_tokens=2100), 0.6)
    texts = [entry["text"] for entry in book.explain("r1", "")["requests"][0]["timeline"]]
    assert texts[-2:] == [
        "w2: 2048 tokens computed in 8 chunks",
        "w2 gave its blocks to others; 2100 tokens to be computed again",
    ]


def test_all_prompts_of_a_call_are_explained_by_any_of_its_ids() -> None:
    book = Book(10)
    opened(book, "r1", "r2")
    for asked in ("cmpl-r1", "r1", "r2"):
        assert [r["request_id"] for r in book.explain(asked, "")["requests"]] == ["r1", "r2"]


def test_ends_say_why_and_each_request_has_one() -> None:
    book = Book(10)
    failed, beside, done = opened(book, "r1", "r2", "r3")
    failed.failure = "no worker is there"
    done.note("done", 0.5, 0, num_output_tokens=1)
    book.close("cmpl-r1", 1.0, Unavailable("no worker is there"))
    states = [(r["state"], r["timeline"][-1]["text"]) for r in book.explain("r1", "")["requests"]]
    assert states == [("failed", "no worker is there"), ("dropped", "the call failed"), ("done", "1 token")]
    assert beside.state == "dropped"


def test_only_the_tenant_that_asked_may_see_it() -> None:
    book = Book(10)
    opened(book, "r1", tenant="alice")
    for _ in range(2):
        assert book.explain("cmpl-r1", "alice")["id"] == "cmpl-r1"
        with pytest.raises(NotFound) as others:
            book.explain("cmpl-r1", "bob")
        book.close("cmpl-r1", 1.0)
    with pytest.raises(NotFound) as nobodys:
        book.explain("cmpl-r9", "bob")
    assert others.value.message == nobodys.value.message.replace("cmpl-r9", "cmpl-r1")


def test_long_story_keeps_its_beginning_and_its_end() -> None:
    book = Book(10)
    (history,) = opened(book, "r1")
    for number in range(100):
        history.note("recovered", float(number), number, why="x" * 1000)
    timeline = book.explain("r1", "")["requests"][0]
    assert timeline["num_left_out"] == 100 - MAX_ENTRIES
    assert [entry["epoch"] for entry in timeline["timeline"]][1 :: MAX_ENTRIES - 1] == [0, 99]
    assert len(timeline["timeline"][-1]["why"]) == MAX_WHY_CHARS


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=30), st.integers(0, 6))
def test_book_keeps_the_last_calls_within_its_bounds_and_nothing_of_others(
    calls: list[tuple[int, bool]], max_requests: int
) -> None:
    book = Book(max_requests, max_bytes=2000)
    for number, (num_prompts, is_late) in enumerate(calls):
        ids = [f"r{number}-{i}" for i in range(num_prompts)]
        for history in opened(book, *ids):
            history.note("done", 1.0, 0)
        book.close(f"cmpl-{ids[0]}", 1.0)
        if is_late:
            book.on_decisions(make_decisions("w1", request_id=ids[0]), 2.0)
        kept = set(book._by_request)
        assert len(book) == len(kept) <= max_requests
        histories = [history for call in book._ended.values() for history in call.histories]
        assert {history.request_id for history in histories} == kept
        assert book._num_bytes == sum(history.num_bytes for history in histories) <= 2000


def noted(world: World) -> list[tuple[str, int, str]]:
    """What the request table has taken down: event, epoch and why."""
    return [(entry.event, entry.epoch, entry.why) for entry in world.request.history.entries]


def test_table_notes_first_token_moves_and_the_end() -> None:
    world = World()
    world.frame(0, [1])
    world.frame(1, [2], finish=m.FINISH_YIELD)
    world.frame(2, [3], finish=m.FINISH_LENGTH)
    assert noted(world) == [("first_token", 0, ""), ("yielded", 0, ""), ("done", 1, "")]
    assert world.request.history.entries[0].instance == "w1"


def test_table_notes_why_it_recovered() -> None:
    world = World()
    world.event("lost", error=Unavailable("the worker is draining"))
    world.event("started")
    world.table.on_left("worker", "w1", world.now)
    world.frame(5, [1])
    world.at(4.0).at(8.0)
    whys = [why for event, _, why in noted(world) if event == "recovered"]
    assert whys[:2] == ["the worker is draining", "worker w1 is gone"]
    assert "a token of w1 is missing" in whys
    assert whys[-1] == "nobody has claimed it for 3 s"


def test_table_notes_why_it_failed() -> None:
    world = World()
    world.event("rejected", error=InvalidRequest("the prompt is too long"))
    world.request.history.end(1.0, "the client went away")
    assert noted(world) == [("failed", 0, "the prompt is too long")]
