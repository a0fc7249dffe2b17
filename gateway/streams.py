"""The requests that this gateway owns, from the first hop to the last token. Pure: time and chance are arguments.

A request is one prompt with one stream a choice. Its tokens are known by (request, epoch, index): frames of an old
epoch and tokens already known are dropped, a missing index means that tokens were lost.

There is one recovery: raise the epoch, cancel what went before, and submit the request again with the tokens that it
has as a prefix. It follows whenever nobody can be trusted to go on with the request:

- a hop came back, or a holder hands it back;
- the instance that holds it left the roster, or, while no holder is known, any instance that might have;
- nobody has claimed it for `CLAIM_LEASE_S`: it was lost on the way;
- a token is missing.

A request that keeps finding a role absent waits for it up to `wait_for_role_s`; a recovered one that has no new token
for `stall_s` fails; and one whose worker died under it `MAX_WORKER_DEATHS` times, with hardly a token between, is taken
to be the cause, and fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from msgspec import structs

from gateway.assembler import Assembler, Delta, RawLogprob
from gateway.explain import History
from weft.columns import pack_u32, unpack_f32, unpack_u32
from weft.errors import DeadlineExceeded, Unavailable, WeftError, WorkerLost
from weft.messages import (
    CLAIM_INTERVAL_S,
    CLAIM_LEASE_S,
    FINISH_ABORT,
    FINISH_ERROR,
    FINISH_NONE,
    FINISH_YIELD,
    Cancel,
    Choice,
    Claims,
    GenerateRequest,
    Role,
    RowLogprobs,
    StreamEvent,
    TokenFrame,
)

MAX_WORKER_DEATHS: Final = 3
# So many new tokens acquit a request of its worker's last death.
PROGRESS_TOKENS: Final = 16
FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 1.0
# A dead worker's requests are not all prefilled again at the same moment elsewhere.
RECOVERIES_AT_ONCE: Final = 32
RECOVERY_PAUSE_S: Final = 0.05
# Roles that may hold a request, in the order in which it meets them.
_HOLDERS: Final[tuple[Role, ...]] = ("tokenizer", "scheduler", "worker")


class Owner(Protocol):
    """Whoever reads a request's streams: the HTTP call behind it."""

    def on_delta(self, stream: Stream, delta: Delta) -> None: ...

    def on_failed(self, request: Request, error: WeftError) -> None: ...

    def on_ended(self, request: Request) -> None: ...


@dataclass(slots=True, eq=False)
class Stream:
    """One choice."""

    slot: int
    index: int  # of the choice in the answer
    seed: int
    assembler: Assembler
    request: Request
    has_yielded: bool = False  # in this epoch


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way through the ring."""

    message: GenerateRequest  # as of the present epoch, but for `choices`
    owner: Owner
    history: History
    streams: list[Stream] = field(default_factory=list)
    arrived_at: float = 0.0
    holder: tuple[Role, str] | None = None
    leased_until: float = 0.0
    submit_at: float | None = None  # set while it waits to be submitted again
    retries: int = 0  # since the last new token
    stuck_since: float | None = None  # the first failure since the last new token, or since a scheduler took it
    recovering_since: float | None = None  # the first recovery since the last new token
    last_token_at: float | None = None
    first_token_at: float | None = None
    worker_deaths: int = 0  # in a row
    num_tokens_at_death: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None

    @property
    def request_id(self) -> str:
        return self.message.request_id

    @property
    def epoch(self) -> int:
        return self.message.epoch

    @property
    def num_output_tokens(self) -> int:
        return sum(stream.assembler.num_counted for stream in self.streams)

    def unfinished(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.assembler.finish_reason is None]


@dataclass(slots=True)
class TableStats:
    """Counters since start."""

    submitted: int = 0
    recovered: int = 0
    yielded: int = 0  # went on elsewhere as a policy wanted
    stale_rows: int = 0
    repeated_tokens: int = 0
    missing_tokens: int = 0
    frame_gaps: int = 0
    expired_leases: int = 0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may go without what it needs, in seconds."""

    wait_for_role_s: float
    stall_s: float


class RequestTable:
    """All live requests of one gateway.

    `send` hands a message to the ring: a `GenerateRequest` to its tokenizers, a `Cancel` to all. `jitter` gives a
    random number in [0, 1).
    """

    def __init__(
        self,
        gateway: str,
        patience: Patience,
        send: Callable[[GenerateRequest | Cancel], None],
        jitter: Callable[[], float],
    ) -> None:
        self.stats = TableStats()
        self._gateway = gateway
        self._patience = patience
        self._send = send
        self._jitter = jitter
        self._requests: dict[str, Request] = {}
        self._streams: dict[int, Stream] = {}
        self._next_slot = 0
        self._next_sequence: dict[tuple[str, int], int] = {}
        self._incomplete_since: float | None = None

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def add(
        self, message: GenerateRequest, owner: Owner, assemblers: Iterable[tuple[int, int, Assembler]], now: float
    ) -> Request:
        """Take in a request and submit it. `assemblers` are (choice index, seed, assembler) of its streams."""
        request = Request(message, owner, History(message.request_id, now), arrived_at=now)
        for index, seed, assembler in assemblers:
            stream = Stream(self._next_slot, index, seed, assembler, request)
            self._next_slot = (self._next_slot + 1) % 2**32
            request.streams.append(stream)
            self._streams[stream.slot] = stream
        self._requests[request.request_id] = request
        self._submit(request, now)
        return request

    def drop(self, request: Request) -> None:
        """Forget a request whose reader is gone; whoever works on it is told."""
        if self._forget(request):
            self._cancel(request, ())

    def fail_all(self, error: WeftError) -> None:
        """End every request with this error."""
        for request in list(self._requests.values()):
            self._fail(request, error)

    def on_frame(self, frame: TokenFrame, now: float) -> None:
        """Give the tokens of a frame to their streams."""
        self._check_sequence(frame, now)
        token_ids = unpack_u32(frame.token_ids)
        logprobs = {entry.row: entry for entry in frame.logprobs}
        holder = ("worker", frame.worker)
        start = 0
        rows = zip(
            unpack_u32(frame.slots),
            unpack_u32(frame.epochs),
            unpack_u32(frame.first_indices),
            frame.counts,
            frame.finishes,
            strict=True,
        )
        for row, (slot, epoch, first_index, count, finish) in enumerate(rows):
            tokens = token_ids[start : start + count]
            start += count
            stream = self._streams.get(slot)
            if stream is None or stream.request.message.epoch != epoch:
                self.stats.stale_rows += 1
                continue
            request = stream.request
            request.holder = holder  # type: ignore[assignment]  # a role and an instance
            request.leased_until = now + CLAIM_LEASE_S
            known = len(stream.assembler.token_ids) - first_index
            if known < 0:
                self.stats.missing_tokens -= known
                self._recover(request, now, why=f"a token of {frame.worker} is missing")
            elif finish == FINISH_ERROR:
                self._fail(request, frame.errors[row].to_error() if row in frame.errors else WeftError("failed"))
            elif finish == FINISH_ABORT:
                self._recover(request, now, why=f"{frame.worker} let it go")
            else:
                self.stats.repeated_tokens += min(known, count)
                entry = logprobs.get(row)
                shown = FINISH_NONE if finish == FINISH_YIELD else finish
                stream.has_yielded |= finish == FINISH_YIELD
                self._deliver(stream, tokens[known:], shown, _raw_logprobs(entry)[known:] if entry else (), now)
                if finish or stream.assembler.finish_reason is not None:
                    self._go_on(request, now)

    def on_event(self, event: StreamEvent, now: float) -> None:
        """Take in what a role says of a request."""
        request = self._requests.get(event.request_id)
        if request is None or event.epoch != request.epoch:
            self.stats.stale_rows += 1
            return
        error = event.error.to_error() if event.error else Unavailable(f"{event.role} {event.instance} let it go")
        request.history.on_news(event, now)
        match event.kind:
            case "queued" | "started":
                request.holder = (event.role, event.instance)
                request.leased_until = now + CLAIM_LEASE_S
                request.stuck_since = None
                if event.kind == "started":
                    request.num_prompt_tokens = event.num_prompt_tokens
                    if request.num_cached_tokens is None:
                        request.num_cached_tokens = event.num_cached_tokens
                    request.message.stamps.update(event.stamps)
            case "lost":
                self._recover(request, now, error)
            case "rejected" if error.code == "overloaded" and request.epoch:
                # Admission is for new requests; this one was admitted once, and has a reader.
                self._recover(request, now, error)
            case "rejected":
                self._fail(request, error)

    def on_returned(self, request_id: str, epoch: int, error: WeftError, now: float) -> None:
        """Our own hop came back: nobody listens there, or it could not be read."""
        request = self._requests.get(request_id)
        if request is not None and request.epoch == epoch:
            if isinstance(error, Unavailable):
                self._recover(request, now, error)
            else:
                self._fail(request, error)

    def on_claims(self, claims: Claims, now: float) -> None:
        """Renew the leases of what an instance says it holds; what ended or moved on meanwhile is cancelled again."""
        for request_id, epoch in zip(claims.request_ids, unpack_u32(claims.epochs), strict=True):
            request = self._requests.get(request_id)
            if request is None or request.epoch > epoch:
                # The first Cancel was lost, or is still on its way.
                self._send(Cancel(request_id, epoch, self._gateway))
            elif request.epoch == epoch:
                request.leased_until = now + CLAIM_LEASE_S
                if request.holder is None or _HOLDERS.index(claims.role) >= _HOLDERS.index(request.holder[0]):
                    request.holder = (claims.role, claims.instance)

    def on_left(self, role: Role, instance: str, now: float) -> None:
        """An instance is gone, and with it what it held; what is between two holders may have been with it."""
        if role not in _HOLDERS:
            return
        lost = [
            request
            for request in self._requests.values()
            if request.submit_at is None and request.holder in (None, (role, instance))
        ]
        for number, request in enumerate(lost):
            # One that was on its way counts too: it may have ended the worker before anybody could claim it.
            if role == "worker":
                self._count_death(request)
            delay_s = number // RECOVERIES_AT_ONCE * RECOVERY_PAUSE_S
            self._recover(request, now, delay_s=delay_s, why=f"{role} {instance} is gone")
        self._next_sequence = {key: value for key, value in self._next_sequence.items() if key[0] != instance}

    def on_joined(self, now: float) -> None:
        """Somebody is there who was not: those that wait for a role need not wait for their next try."""
        for request in self._requests.values():
            if request.submit_at is not None:
                request.submit_at = min(request.submit_at, now + FIRST_RETRY_S * self._jitter())

    def on_reconnect(self, now: float) -> None:
        """The bus was away: silence until now proves nothing."""
        for request in self._requests.values():
            request.leased_until = now + CLAIM_LEASE_S

    def tick(self, now: float, missing: str = "") -> None:
        """Submit what is due, recover what nobody claims, fail what waited too long. Call it ten times a second.

        `missing` names roles that are not there: a scheduler may hold requests for as long as it likes, but not for
        a worker that does not come.
        """
        if not missing:
            self._incomplete_since = None
        elif self._incomplete_since is None:
            self._incomplete_since = now
        for request in list(self._requests.values()):
            if self._has_waited(request, now) and (request.holder is None or request.holder[0] != "worker"):
                self._fail(request, Unavailable(f"no {missing} is there", retry_after_s=1.0))
            elif request.submit_at is not None:
                if now >= request.submit_at:
                    self._submit(request, now)
            elif now > request.leased_until:
                self.stats.expired_leases += 1
                self._recover(request, now, why=f"nobody has claimed it for {CLAIM_LEASE_S:g} s")
            elif self._has_stalled(request, now):
                self._fail(request, DeadlineExceeded(f"no token for {self._patience.stall_s:g} s"))

    def _has_waited(self, request: Request, now: float) -> bool:
        """Whether a role has been missing for too long, counted from the request: it may be what workers start for."""
        since = self._incomplete_since
        return since is not None and now - max(since, request.arrived_at) > self._patience.wait_for_role_s

    def _has_stalled(self, request: Request, now: float) -> bool:
        since = request.recovering_since
        return since is not None and now - since > self._patience.stall_s

    def _deliver(
        self, stream: Stream, token_ids: list[int], finish: int, logprobs: tuple[RawLogprob, ...], now: float
    ) -> None:
        request = stream.request
        if token_ids:
            request.last_token_at = now
            request.stuck_since, request.recovering_since, request.retries = None, None, 0
            if request.first_token_at is None:
                request.first_token_at = now
                instance = request.holder[1] if request.holder else ""
                request.history.note("first_token", now, request.epoch, instance=instance)
        elif finish == FINISH_NONE:
            return
        delta = stream.assembler.push(token_ids, finish, logprobs)
        if delta is not None:
            request.owner.on_delta(stream, delta)
        if stream.assembler.finish_reason is not None:
            self._end_stream(stream, now, told=finish != FINISH_NONE)

    def _go_on(self, request: Request, now: float) -> None:
        """Once the worker has handed back, as it was told to, all that has not ended: the request goes on elsewhere."""
        rest = request.unfinished()
        if not rest or not all(stream.has_yielded for stream in rest):
            return
        message = request.message
        request.history.note("yielded", now, message.epoch, num_output_tokens=request.num_output_tokens)
        request.message = structs.replace(message, epoch=message.epoch + 1, yield_epoch=message.epoch + 1)
        request.holder = None
        self.stats.yielded += 1
        self._submit(request, now)

    def _end_stream(self, stream: Stream, now: float, told: bool) -> None:
        """A choice is complete; `told` if the worker knows. The last one ends the request."""
        request = stream.request
        self._streams.pop(stream.slot, None)
        rest = request.unfinished()
        if not told:
            # What the worker has handed back it cannot tell the end of.
            ended = () if stream.has_yielded else (stream.assembler.num_counted,)
            self._cancel(request, (stream.slot,) if rest else (), ended)
        if not rest and self._forget(request):
            request.history.note("done", now, request.epoch, num_output_tokens=request.num_output_tokens)
            request.owner.on_ended(request)

    @staticmethod
    def _count_death(request: Request) -> None:
        num_tokens = sum(len(stream.assembler.token_ids) for stream in request.streams)
        if num_tokens - request.num_tokens_at_death >= PROGRESS_TOKENS:
            request.worker_deaths = 0
        request.worker_deaths += 1
        request.num_tokens_at_death = num_tokens

    def _recover(
        self, request: Request, now: float, error: WeftError | None = None, *, delay_s: float = 0.0, why: str = ""
    ) -> None:
        if request.worker_deaths >= MAX_WORKER_DEATHS:
            self._fail(request, WorkerLost(f"the workers of this request died {request.worker_deaths} times in a row"))
            return
        if request.stuck_since is None:
            request.stuck_since = now
        elif now - request.stuck_since > self._patience.wait_for_role_s:
            self._fail(request, error or Unavailable("the request could not be placed"))
            return
        if request.recovering_since is None:
            request.recovering_since = now
        elif self._has_stalled(request, now):
            self._fail(request, error or DeadlineExceeded(f"no token for {self._patience.stall_s:g} s"))
            return
        self.stats.recovered += 1
        request.history.note("recovered", now, request.epoch, why=why or (error.message if error else ""))
        self._cancel(request, ())
        request.message = structs.replace(request.message, epoch=request.epoch + 1)
        request.holder = None
        if request.retries:
            delay_s += min(LAST_RETRY_S, FIRST_RETRY_S * 2**request.retries) * (0.5 + self._jitter() / 2)
        request.retries += 1
        if delay_s:
            request.submit_at = now + delay_s
        else:
            self._submit(request, now)

    def _submit(self, request: Request, now: float) -> None:
        choices = [
            Choice(stream.slot, stream.seed, pack_u32(stream.assembler.token_ids)) for stream in request.unfinished()
        ]
        for stream in request.streams:
            stream.has_yielded = False
        request.submit_at = None
        request.leased_until = now + CLAIM_LEASE_S
        self.stats.submitted += 1
        self._send(structs.replace(request.message, choices=choices))

    def _fail(self, request: Request, error: WeftError) -> None:
        if self._forget(request):
            request.history.failure = error.message
            self._cancel(request, ())
            request.owner.on_failed(request, error)

    def _forget(self, request: Request) -> bool:
        for stream in request.streams:
            self._streams.pop(stream.slot, None)
        return self._requests.pop(request.request_id, None) is not None

    def _cancel(self, request: Request, slots: tuple[int, ...], ended: tuple[int, ...] = ()) -> None:
        """`ended`: the tokens of choices that are complete."""
        self._send(Cancel(request.request_id, request.epoch, self._gateway, pack_u32(slots), pack_u32(ended)))

    def _check_sequence(self, frame: TokenFrame, now: float) -> None:
        """After lost frames, a stream with more tokens shows the gap itself; one whose end was lost only falls silent.

        So a gap shortens the leases of all that the worker holds: what it does not claim within two rounds ended there.
        """
        key = (frame.worker, frame.worker_epoch)
        expected = self._next_sequence.get(key, 0)
        self._next_sequence[key] = max(expected, frame.sequence + 1)
        if frame.sequence <= expected:
            return
        self.stats.frame_gaps += 1
        for request in self._requests.values():
            if request.holder == ("worker", frame.worker):
                request.leased_until = min(request.leased_until, now + 2.5 * CLAIM_INTERVAL_S)


def _raw_logprobs(entry: RowLogprobs) -> tuple[RawLogprob, ...]:
    sampled, ids, values = (
        unpack_f32(entry.sampled),
        unpack_u32(entry.top_token_ids),
        unpack_f32(entry.top_values),
    )
    k = entry.k
    return tuple(
        (value, tuple(ids[i * k : (i + 1) * k]), tuple(values[i * k : (i + 1) * k])) for i, value in enumerate(sampled)
    )
