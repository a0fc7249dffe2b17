"""Discrete events over the code that ships: the scheduler's `ClusterState`, every worker's `plan_step` and `BlockPool`.

Only what has a body is played: the clock, the bus (a constant delay), the gateway (arrivals, tokens, requests that are
handed back and enter again) and a worker's forward pass (a formula). A simulated second costs what the decisions in it
cost, so thousands of workers run faster than real time.
"""

from __future__ import annotations

import dataclasses
import gc
import heapq
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec

from lab.simulator.kv_pool import KvPool, KvSharing
from lab.simulator.record import Record, Slo, Summary, summarize
from lab.simulator.trace import Arrival, Trace
from lab.simulator.worker import SCHEDULER, SimWorker
from scheduler_svc.actions import Action, Dispatch, Dropped, Lost, Queued, Reject, WantSnapshot
from scheduler_svc.cost_model import CostModel
from scheduler_svc.policies import PolicyMaker, PolicyNames
from scheduler_svc.policy.predict import Oracle
from scheduler_svc.state import ClusterState
from weft.columns import pack_u32
from weft.errors import InvariantViolation
from weft.hashing import HASH_BYTES
from weft.messages import BlockHash, Choice, KvEvents, SamplingParams, TokenizedRequest, WorkerRole
from worker_svc.batch import Limits
from worker_svc.engine_io import BlocksLoaded, LoadWanted
from worker_svc.sequence import Sequence

MODEL: Final = "model"
GATEWAY: Final = "g0"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers, all alike but for their roles."""

    num_workers: int
    cost: CostModel
    limits: Limits
    kv_tokens: int  # that each worker's KV memory holds
    roles: Mapping[WorkerRole, int] = field(default_factory=dict)  # instead of `num_workers` that do both
    sharing: KvSharing | None = None  # None: each worker has only what it computed itself
    spread: tuple[float, ...] = ()  # factors of the formula's times, for each step one by chance


@dataclass(frozen=True, slots=True)
class Setup:
    """What is played, but for the trace."""

    fleet: Fleet
    names: PolicyNames = field(default_factory=PolicyNames)
    maker: PolicyMaker = field(default_factory=lambda: PolicyMaker(random.Random(1)))
    knows_lengths: bool = False  # predictions are the truth
    says_max_tokens: bool = False  # clients say how long answers are
    hop_s: float = 0.0005  # from one process to the next
    slo: Slo = field(default_factory=Slo)


@dataclass(slots=True)
class Result:
    """What a run gave."""

    setup: Setup
    records: list[Record]
    workers: list[SimWorker]
    state: ClusterState
    num_events: int
    kv_pool: KvPool | None = None

    def summary(self) -> Summary:
        busy = sum(worker.busy_s for worker in self.workers)
        return summarize(self.records, self.setup.slo, busy, len(self.workers))


def simulate(trace: Trace, setup: Setup) -> Result:
    """Play a trace to its end."""
    was_enabled = gc.isenabled()
    # Millions of objects live and hardly any are in cycles: looking for these takes as long as all the rest.
    gc.disable()
    try:
        return Simulation(trace, setup).run()
    finally:
        if was_enabled:
            gc.enable()


class Simulation:
    """One run."""

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self._trace = trace
        self._setup = setup
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = 0
        self._records: dict[str, Record] = {}
        self._requests: dict[str, TokenizedRequest] = {}
        self._finished: list[Record] = []
        maker = dataclasses.replace(setup.maker, block_size=trace.block_size)
        if setup.knows_lengths:
            lengths = {_request_id(i): arrival.num_output_tokens for i, arrival in enumerate(trace.arrivals)}
            maker = _with_oracle(maker, lengths)
        self._state = ClusterState(SCHEDULER, maker, setup.names)
        self._workers = {worker.name: worker for worker in _make_workers(setup.fleet, trace.block_size)}
        self._waits_for: dict[str, int] = {}  # number of the event that ends each worker's run
        self._zeros = memoryview(bytes(4 * max((arrival.num_prompt_tokens for arrival in trace.arrivals), default=0)))
        self._kv = _make_pool(setup.fleet.sharing, trace.block_size, self._workers.values())

    def run(self) -> Result:
        for worker in self._workers.values():
            worker.model = MODEL
            self._carry_out(self._state.on_status(worker.status(), 0.0))
        arrivals = iter(enumerate(self._trace.arrivals))
        self._next_arrival(arrivals)
        while self._events:
            self._now, _, handle, arguments = heapq.heappop(self._events)
            handle(*arguments)
        return Result(
            self._setup, self._finished, list(self._workers.values()), self._state, self._num_events, self._kv
        )

    # ---- events ----

    def _at(self, time: float, handle: Callable[..., None], *arguments: Any) -> int:
        self._num_events += 1
        # Of the same moment, in the order in which they were thought of.
        heapq.heappush(self._events, (time, self._num_events, handle, arguments))
        return self._num_events

    def _next_arrival(self, arrivals: Any) -> None:
        found = next(arrivals, None)
        if found is not None:
            number, arrival = found
            self._at(arrival.at_s, self._arrive, number, arrival, arrivals)

    def _arrive(self, number: int, arrival: Arrival, arrivals: Any) -> None:
        request_id = _request_id(number)
        record = Record(
            request_id,
            self._now,
            arrival.num_prompt_tokens,
            arrival.num_output_tokens,
            arrival.tenant,
            arrival.slo_class,
        )
        self._records[request_id] = record
        # Only its length is looked at, and every prompt shows the same zeros.
        prompt = cast(bytes, self._zeros[: 4 * arrival.num_prompt_tokens])
        request = _make_request(request_id, arrival, prompt, self._trace.block_size, self._setup.says_max_tokens)
        self._requests[request_id] = request
        # Gateway to tokenizer to scheduler.
        self._at(self._now + 2 * self._setup.hop_s, self._schedule, request)
        self._next_arrival(arrivals)

    def _schedule(self, request: TokenizedRequest) -> None:
        self._carry_out(self._state.on_request(request, self._now))

    def _deliver(self, name: str, request: TokenizedRequest, stop_after: int | None) -> None:
        """An assignment reaches its worker."""
        worker, record = self._workers[name], self._records[request.request_id]
        wanted = worker.take(request, record, stop_after)
        if wanted is not None:
            self._fetch(worker, wanted, record.workers[-1] if record.workers else None)
        record.workers.append(name)
        self._nudge(worker)

    def _nudge(self, worker: SimWorker) -> None:
        """Something new is there for a worker: let it plan a step as soon as it can."""
        if worker.run is None:
            self._begin(worker)
        elif worker.run.num_steps > 1:
            self._wake_after(worker, worker.cut(self._now))

    def _fetch(self, worker: SimWorker, wanted: LoadWanted, before: str | None) -> None:
        """Get blocks from the store, or from the worker that had the request before, whichever holds more of them."""
        assert self._kv is not None
        count, source = self._kv.use(wanted.hashes), None
        if before is not None and before != worker.name:
            held = len(self._workers[before].pool.lookup(wanted.hashes))
            if held > count:
                count, source = held, before
        ends_at = self._kv.fetch(worker.name, count, self._now, source)
        loaded = BlocksLoaded(wanted.request_id, wanted.epoch, wanted.hashes[:count], (b"\0",) * count)
        self._at(ends_at, self._take_loaded, worker, loaded, ends_at - self._now)

    def _take_loaded(self, worker: SimWorker, loaded: BlocksLoaded, seconds: float) -> None:
        worker.take_loaded(loaded, seconds)
        self._nudge(worker)

    def _wake(self, worker: SimWorker, number: int) -> None:
        """A worker's run of steps has ended."""
        # It may have been cut short meanwhile.
        if self._waits_for.get(worker.name) != number:
            return
        outcome = worker.finish(self._now)
        for record in outcome.first_tokens:
            record.first_token_at = outcome.first_at + 2 * self._setup.hop_s
        for record in outcome.ended:
            self._end(record)
        for sequence in outcome.yielded:
            self._at(self._now + self._setup.hop_s, self._enter_again, sequence)
        if outcome.ended:
            self._at(self._now + self._setup.hop_s, self._state.on_ended, worker.ended(outcome.ended))
        self._begin(worker)

    def _begin(self, worker: SimWorker) -> None:
        ends_at, rejected = worker.begin(self._now)
        for record in rejected:
            record.refused_at = self._now
            self._end(record)
        if ends_at is not None:
            self._wake_after(worker, ends_at)
        events, stored = worker.kv_events() or (None, ())
        has_news = worker.has_news()
        if events is not None or has_news:
            self._at(self._now + self._setup.hop_s, self._hear, worker, events, has_news)
        if stored and self._kv is not None:
            self._store(worker, stored, self._kv)

    def _store(self, worker: SimWorker, hashes: tuple[BlockHash, ...], pool: KvPool) -> None:
        fresh, ends_at = pool.send(worker.name, hashes, self._now)
        if fresh:
            self._at(ends_at, pool.put, fresh)

    def _wake_after(self, worker: SimWorker, ends_at: float) -> None:
        self._waits_for[worker.name] = self._at(ends_at, self._wake, worker, self._num_events + 1)

    def _hear(self, worker: SimWorker, events: KvEvents | None, has_news: bool) -> None:
        """The scheduler hears of a worker's blocks, and what it is like by now."""
        if events is not None:
            self._carry_out(self._state.on_kv(events, self._now))
        if has_news:
            self._carry_out(self._state.on_status(worker.status(), self._now))

    def _enter_again(self, sequence: Sequence) -> None:
        """The gateway sends what was handed back into the ring again."""
        request_id = sequence.request.request_id
        before = self._requests[request_id]
        choice = Choice(0, 0, pack_u32([0] * sequence.num_output_tokens))
        request = msgspec.structs.replace(
            before, epoch=before.epoch + 1, yield_epoch=before.epoch + 1, choices=[choice]
        )
        self._requests[request_id] = request
        self._at(self._now + 2 * self._setup.hop_s, self._schedule, request)

    # ---- actions ----

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Dispatch(request, decision, stop_after):
                    self._at(self._now + self._setup.hop_s, self._deliver, decision.worker, request, stop_after)
                case Reject(request):
                    record = self._records[request.request_id]
                    record.refused_at = self._now
                    self._end(record)
                case Lost(request) | Dropped(request):
                    raise InvariantViolation(f"request {request.request_id} got lost, and nothing died")
                case Queued() | WantSnapshot():
                    pass

    def _end(self, record: Record) -> None:
        if record.refused_at is None:
            record.ended_at = self._now + 2 * self._setup.hop_s
        self._finished.append(record)
        del self._records[record.request_id], self._requests[record.request_id]


def _make_workers(fleet: Fleet, block_size: int) -> list[SimWorker]:
    roles = fleet.roles or {"both": fleet.num_workers}
    return [
        SimWorker(
            f"{role}-{i}",
            fleet.cost,
            fleet.limits,
            num_blocks=max(1, fleet.kv_tokens // block_size),
            block_size=block_size,
            role=role,
            spread=fleet.spread,
        )
        for role, count in roles.items()
        for i in range(count)
    ]


def _make_pool(sharing: KvSharing | None, block_size: int, workers: Iterable[SimWorker]) -> KvPool | None:
    if sharing is None:
        return None
    pool = KvPool(sharing, block_size)
    for worker in workers:
        worker.share_kv(pool.block_s)
    return pool


def _with_oracle(maker: PolicyMaker, lengths: Mapping[str, int]) -> PolicyMaker:
    return dataclasses.replace(maker, make_predictor=lambda: Oracle(lengths))


def _request_id(number: int) -> str:
    return f"r{number}"


def _make_request(
    request_id: str, arrival: Arrival, prompt: bytes, block_size: int, says_max_tokens: bool
) -> TokenizedRequest:
    # Only whole blocks are shared.
    whole = arrival.block_ids[: arrival.num_prompt_tokens // block_size]
    return TokenizedRequest(
        request_id=request_id,
        epoch=0,
        gateway=GATEWAY,
        model=MODEL,
        prompt_token_ids=prompt,
        block_hashes=b"".join(block_id.to_bytes(HASH_BYTES, "big") for block_id in whole),
        sampling=SamplingParams(max_tokens=arrival.num_output_tokens if says_max_tokens else None),
        choices=[Choice(0, 0)],
        tenant=arrival.tenant,
        priority=arrival.priority,
        slo_class=arrival.slo_class,
    )
