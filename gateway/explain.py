"""What became of a request, and why: its time line and the decisions about it. Pure.

Each request has a `History`, which what happens to it is noted in; the `Book` finds it by the id that the client saw,
while it runs and for a while after. All is bounded: entries of a history, requests in the book, and their bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from weft.errors import NotFound, WeftError
from weft.messages import BacklogPlace, Decision, Decisions, Placed, StreamEvent

# Of a request that is recovered or handed back again and again, the first and the last of these stay.
MAX_ENTRIES: Final = 48
MAX_WHY_CHARS: Final = 300
# What is kept of requests that have ended.
MAX_BOOK_BYTES: Final = 8 * 2**20

Event = Literal[
    "received",
    "tokenized",
    "queued",
    "scheduled",
    "started",
    "prefill",
    "first_token",
    "preempted",
    "yielded",
    "recovered",
    "done",
    "failed",
    "dropped",
]
ENDS: Final = ("done", "failed", "dropped")


class Entry(msgspec.Struct, omit_defaults=True):
    """One thing that happened; times are seconds after the request's arrival."""

    event: Event
    at_s: float
    epoch: int
    instance: str = ""
    why: str = ""
    decision: Decision | None = None
    place: BacklogPlace | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_chunks: int | None = None
    num_computed_tokens: int | None = None
    num_output_tokens: int | None = None


@dataclass(slots=True)
class History:
    """The time line of one request. Times that others stamped are theirs, as far as clocks agree."""

    request_id: str
    arrived_at: float  # monotonic seconds
    entries: list[Entry] = field(default_factory=list)
    state: Event | Literal["running"] = "running"
    failure: str = ""
    num_left_out: int = 0
    num_bytes: int = 0  # about what it takes
    _tokenized_epoch: int = -1

    def note(
        self,
        event: Event,
        now: float,
        epoch: int,
        *,
        instance: str = "",
        why: str = "",
        num_output_tokens: int | None = None,
    ) -> None:
        """Take down what the gateway itself saw or did."""
        at_s = now - self.arrived_at
        self._add(Entry(event, at_s, epoch, instance, why[:MAX_WHY_CHARS], num_output_tokens=num_output_tokens))
        if event in ENDS:
            self.state = event

    def on_news(self, news: StreamEvent, now: float) -> None:
        """Take down what a role says of the request; what ends an epoch is noted by whoever acts on it."""
        self._note_tokenized(news, now)
        epoch, instance = news.epoch, news.instance
        match news.kind:
            case "queued":
                self._add(Entry("queued", now - self.arrived_at, epoch, instance, place=news.place))
            case "started":
                entry = Entry("started", self._at(news, "started", now), epoch, instance)
                entry.num_prompt_tokens, entry.num_cached_tokens = news.num_prompt_tokens, news.num_cached_tokens
                self._add(entry)
            case "prefill" | "preempted":
                entry = Entry(news.kind, now - self.arrived_at, epoch, instance)
                entry.num_chunks, entry.num_computed_tokens = news.num_chunks, news.num_computed_tokens
                self._add(entry)

    def on_placed(self, placed: Placed, scheduler: str, now: float) -> None:
        """Take down a scheduler's decision; it may come late."""
        self._note_tokenized(placed, now)
        at_s = self._at(placed, "scheduler", now)
        self._add(Entry("scheduled", at_s, placed.epoch, scheduler, decision=placed.decision))

    def end(self, now: float, why: str) -> None:
        """Note the end of a request that has not come to its own: `why` it was let go of, if it did not fail."""
        if self.state == "running":
            epoch = self.entries[-1].epoch if self.entries else 0
            self.note("failed" if self.failure else "dropped", now, epoch, why=self.failure or why)

    def _note_tokenized(self, news: StreamEvent | Placed, now: float) -> None:
        if news.epoch > self._tokenized_epoch and "tokenizer" in news.stamps:
            self._tokenized_epoch = news.epoch
            at_s = self._at(news, "tokenizer", now)
            self._add(Entry("tokenized", at_s, news.epoch, num_prompt_tokens=news.num_prompt_tokens))

    def _at(self, news: StreamEvent | Placed, hop: str, now: float) -> float:
        """Seconds from the request's arrival to the hop's stamp; to now without one."""
        stamps = news.stamps
        if hop not in stamps or "gateway" not in stamps:
            return now - self.arrived_at
        return max(0.0, stamps[hop] - stamps["gateway"])

    def _add(self, entry: Entry) -> None:
        if len(self.entries) == MAX_ENTRIES:
            self.num_bytes -= _size(self.entries.pop(MAX_ENTRIES // 2))
            self.num_left_out += 1
        self.entries.append(entry)
        self.num_bytes += _size(entry)


@dataclass(frozen=True, slots=True)
class _Call:
    """One HTTP call: a history for each of its prompts."""

    response_id: str
    tenant: str
    model: str
    histories: Sequence[History]


class Book:
    """Histories by the id of the answer or of the request, of those that run and of the last that ended."""

    def __init__(self, max_requests: int, max_bytes: int = MAX_BOOK_BYTES) -> None:
        """`max_requests`: ended ones to keep; a call with several prompts is as many."""
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._live: dict[str, _Call] = {}
        self._ended: OrderedDict[str, _Call] = OrderedDict()
        self._by_request: dict[str, tuple[_Call, History]] = {}
        self._num_ended = 0
        self._num_bytes = 0

    def __len__(self) -> int:
        """Requests that ended and are kept."""
        return self._num_ended

    def open(self, response_id: str, tenant: str, model: str, histories: Sequence[History]) -> None:
        """A call begins."""
        call = self._live[response_id] = _Call(response_id, tenant, model, histories)
        for history in histories:
            self._by_request[history.request_id] = call, history

    def on_decisions(self, decisions: Decisions, now: float) -> None:
        """Some of these requests may have ended since, or have gone on elsewhere."""
        for placed in decisions.placed:
            call, history = self._by_request.get(placed.request_id, (None, None))
            if call is None or history is None:
                continue
            before = history.num_bytes
            history.on_placed(placed, decisions.scheduler, now)
            if call.response_id in self._ended:
                self._num_bytes += history.num_bytes - before
        self._trim()

    def close(self, response_id: str, now: float, error: WeftError | None = None) -> None:
        """A call has ended, with this error, or is read no more."""
        call = self._live.pop(response_id, None)
        if call is None:
            return
        for history in call.histories:
            history.end(now, "the call failed" if error else "the client went away")
            self._num_bytes += history.num_bytes
        self._ended[response_id] = call
        self._num_ended += len(call.histories)
        self._trim()

    def explain(self, asked: str, tenant: str) -> dict[str, Any]:
        """All that is known of a call, by its id or that of one of its requests, for the tenant that made it.

        Raises:
            NotFound: it is not known here, or another tenant's.
        """
        call, _ = self._by_request.get(asked, (None, None))
        call = call or self._live.get(asked) or self._ended.get(asked)
        if call is None or call.tenant != tenant:
            raise NotFound(
                f"no request {asked[:100]!r} is known here; a gateway explains those of yours that run, and the last "
                f"{self._max_requests} that ended"
            )
        requests = [_view(history) for history in call.histories]
        return {"id": call.response_id, "object": "explanation", "model": call.model, "requests": requests}

    def _trim(self) -> None:
        while self._num_ended > self._max_requests or self._num_bytes > self._max_bytes:
            _, call = self._ended.popitem(last=False)
            self._num_ended -= len(call.histories)
            for history in call.histories:
                self._num_bytes -= history.num_bytes
                del self._by_request[history.request_id]


def sentence(decision: Decision) -> str:
    """Why a request was placed where it was, in plain English."""
    chosen = decision.scores[0] if decision.scores else None
    facts = [f"{decision.worker}: {decision.policy}, {decision.rule}"]
    if chosen is not None:
        held = _cached(decision)
        facts[0] += f": {held}" if held else ""
        others = f", {decision.least_load} on the least loaded of {decision.num_candidates}"
        facts.append(
            f"{_count(chosen.load, 'sequence')} there"
            + (others if decision.num_candidates > 1 else ", the only worker with room")
        )
    # As long as nobody has measured anything, all is expected at once.
    if decision.expected_ttft_s:
        facts.append(f"first token expected within {decision.expected_ttft_s:.3g} s")
    if decision.stop_after is not None:
        facts.append(f"to be handed back after {_count(decision.stop_after, 'token')}")
    return "; ".join(facts)


def _cached(decision: Decision) -> str:
    """What the chosen worker, and the best of the others, hold of the prompt."""
    chosen, blocks = decision.scores[0], decision.num_prompt_blocks
    best = max(decision.scores, key=lambda score: score.matched_blocks)
    if not blocks or not best.matched_blocks:
        return ""
    held = f"holds {chosen.matched_blocks or 'none'} of {_count(blocks, 'prompt block')}"
    return held if best.matched_blocks <= chosen.matched_blocks else f"{held}, {best.worker} {best.matched_blocks}"


def _waits(place: BacklogPlace) -> str:
    """Why a request waits, and where."""
    reason = f"none of {_count(place.num_workers, 'worker')} has room" if place.num_workers else "no worker is there"
    if place.order == "fcfs":
        where = f"number {place.num_waiting} in the backlog"
    else:
        where = f"one of {place.num_waiting} in the backlog, in the order of {place.order}"
    return f"{reason}; admitted by {place.admit}, {where}"


def _text(entry: Entry) -> str:
    """An entry in words, but for its event and time."""
    prompt = _count(entry.num_prompt_tokens or 0, "prompt token")
    computed = _count(entry.num_computed_tokens or 0, "token")
    output = _count(entry.num_output_tokens or 0, "token")
    match entry:
        case Entry(decision=Decision() as decision):
            return sentence(decision)
        case Entry(place=BacklogPlace() as place):
            return _waits(place)
        case Entry(event="tokenized"):
            return prompt
        case Entry(event="started"):
            return f"{entry.instance}: {entry.num_cached_tokens} of {prompt} found in caches"
        case Entry(event="prefill"):
            return f"{entry.instance}: {computed} computed in {_count(entry.num_chunks or 0, 'chunk')}"
        case Entry(event="preempted"):
            return f"{entry.instance} gave its blocks to others; {computed} to be computed again"
        case Entry(event="yielded"):
            return f"handed back as decided, with {output}, to be placed again"
        case Entry(event="done"):
            return output
        case Entry(event="first_token"):
            return f"from {entry.instance}"
        case _:
            return entry.why


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(entry: Entry) -> int:
    """About the bytes that an entry takes, in CPython 3.11."""
    num_scores = len(entry.decision.scores) if entry.decision is not None else 0
    return 250 + len(entry.why) + 180 * num_scores


def _view(history: History) -> dict[str, Any]:
    """A time line in the order of its times; `why` is the last decision's sentence."""
    entries = [Entry("received", 0.0, 0), *sorted(history.entries, key=lambda entry: entry.at_s)]
    decisions = [entry.decision for entry in entries if entry.decision is not None]
    return {
        "request_id": history.request_id,
        "state": history.state,
        "why": sentence(decisions[-1]) if decisions else "",
        "num_left_out": history.num_left_out,
        "timeline": _view_entries(entries),
    }


def _view_entries(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    found, worker = [], ""
    for entry in entries:
        text = _text(entry)
        if entry.decision is not None:
            text += f"; moved from {worker}" if worker not in ("", entry.decision.worker) else ""
            worker = entry.decision.worker
        found.append({**msgspec.to_builtins(entry), "at_s": round(entry.at_s, 6), "text": text})
    return found
