"""Whatever happens in whatever order: no worker is overloaded, no request is forgotten, and order is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.actions import Action, Dispatch, Dropped, Lost, Queued, Reject
from scheduler_svc.policy.order import ORDERS
from scheduler_svc.policy.route import ROUTES
from scheduler_svc.state import ClusterState
from tests.support.scheduling import SCHEDULER, make_maker, make_request, make_state, make_status
from weft.errors import Unavailable
from weft.messages import Cancel, Declined, Heartbeat, State, TokenizedRequest
from weft.subjects import Returned

MAX_NUM_SEQS = 4
WORKERS = ("w0", "w1", "w2")
MODELS = {"w0": "m0", "w1": "m0", "w2": "m1"}
Key = tuple[str, int]


@dataclass
class FakeWorker:
    """What a worker would do: takes in order, counts what it took, and says so when asked."""

    name: str
    epoch: int = 0
    inbox: list[TokenizedRequest] = field(default_factory=list)
    running: list[TokenizedRequest] = field(default_factory=list)
    accepted: int = 0
    unseen: list[TokenizedRequest] = field(default_factory=list)  # accepted, and no status has said so
    free: int = 0  # sequences, by the last status
    is_up: bool = False
    is_draining: bool = False

    @property
    def num_held(self) -> int:
        return sum(len(request.choices) for request in (*self.running, *self.inbox))


class Place(NamedTuple):
    """Where a waiting request stands among those of its model."""

    is_new: bool
    arrival: int
    model: str


class Simulation:
    """A scheduler, its workers, and what the test believes of each request."""

    def __init__(self, route: str, order: str = "fcfs") -> None:
        self.order = order
        self.state: ClusterState = make_state(make_maker(4, 10_000), admit="bounded", route=route, order=order)
        self.workers = {name: FakeWorker(name) for name in WORKERS}
        self.now = 0.0
        self.num_schedulers = 1
        self.waiting: dict[Key, Place] = {}  # what the scheduler must hold
        self.arrivals: dict[Key, int] = {}
        self.handed_on: list[TokenizedRequest] = []  # what a dead worker may or may not have taken
        self.ended: set[Key] = set()
        self.log: list[str] = []

    def run(self, steps: list[tuple[Any, ...]]) -> None:
        for name, *arguments in steps:
            self.now += 0.01
            getattr(self, f"do_{name}")(*arguments)
            self.state.check()
            assert {(r.request_id, r.epoch) for r in self.state.waiting()} == set(self.waiting)

    # ---- steps ----

    def do_request(self, number: int, epoch: int, num_choices: int, model: int) -> None:
        request = make_request(f"r{number}", epoch=epoch, num_choices=num_choices, model=f"m{model}", blocks=[1, 2])
        key = (request.request_id, request.epoch)
        if key in self.arrivals:
            return
        self.arrivals[key] = len(self.arrivals)
        self.take(self.state.on_request(request, self.now), arriving=request)

    def do_cancel(self, number: int, epoch: int) -> None:
        self.take(self.state.on_cancel(Cancel(f"r{number}", epoch, "g0"), self.now))

    def do_status(self, name: str, state: State = "ready") -> None:
        worker = self.workers[name]
        if not worker.is_up:
            worker.__init__(name, worker.epoch + 1)  # type: ignore[misc]  # a new life
            worker.is_up = True
        worker.is_draining = state == "draining"
        num_running = sum(len(request.choices) for request in worker.running)
        worker.free, worker.unseen = MAX_NUM_SEQS - num_running, []
        status = make_status(
            name, worker_epoch=worker.epoch, model=MODELS[name], state=state, num_running=num_running,
            accepted={SCHEDULER: worker.accepted}, num_waiting_tokens=7 * num_running,
            # As measured: no whole numbers, and not yet at first.
            prefill_tokens_per_s=worker.accepted / 3, decode_tokens_per_s=self.now, step_s=0.1,
        )  # fmt: skip
        self.take(self.state.on_status(status, self.now))

    def do_accept(self, name: str) -> None:
        worker = self.workers[name]
        if worker.inbox:
            request = worker.inbox.pop(0)
            worker.running.append(request)
            worker.unseen.append(request)
            worker.accepted += len(request.choices)

    def do_decline(self, name: str) -> None:
        worker = self.workers[name]
        if worker.inbox:
            request = worker.inbox.pop(0)
            self.put_back([request])
            self.take(self.state.on_declined(Declined(request, name), self.now))

    def do_finish(self, name: str) -> None:
        if self.workers[name].running:
            self.workers[name].running.pop(0)

    def do_die(self, name: str, how: str) -> None:
        worker = self.workers[name]
        if not worker.is_up:
            return
        # What a status has accounted for is the worker's; what has not is put back.
        unseen = [*worker.unseen, *worker.inbox]
        if how == "returned" and not worker.inbox:
            return
        # What nobody can know to have been taken or not is the gateway's to decide.
        worker.running, worker.is_up, returned = [], False, worker.inbox[:1]
        worker.inbox = []
        if how == "returned":
            self.put_back(returned)
            self.handed_on += [request for request in unseen if request is not returned[0]]
            hop = Returned("g0", returned[0].request_id, returned[0].epoch)
            self.take(self.state.on_returned(hop, Unavailable("nobody"), self.now))
        else:
            self.handed_on += unseen
            for state in ("ready", "dead"):
                beat = Heartbeat("worker", name, worker.epoch, state)  # type: ignore[arg-type]
                self.take(self.state.on_heartbeat(beat, self.now))
        assert not self.handed_on

    def do_schedulers(self, count: int) -> None:
        self.num_schedulers = count
        for other in ("s1", "s2"):
            state = "ready" if int(other[1]) < count else "draining"
            self.take(self.state.on_heartbeat(Heartbeat("scheduler", other, 1, state), self.now))  # type: ignore[arg-type]

    # ---- judging ----

    def put_back(self, requests: list[TokenizedRequest]) -> None:
        for request in requests:
            key = (request.request_id, request.epoch)
            self.waiting[key] = Place(request.epoch == 0, self.arrivals[key], request.model)

    def take(self, actions: list[Action], arriving: TokenizedRequest | None = None) -> None:
        if arriving is not None:
            key = (arriving.request_id, arriving.epoch)
            self.waiting[key] = Place(arriving.epoch == 0, self.arrivals[key], arriving.model)
        for action in actions:
            self.log.append(repr(action))
            if isinstance(action, Dispatch):
                self.judge_dispatch(action)
            elif isinstance(action, Reject | Lost | Dropped):
                key = (action.request.request_id, action.request.epoch)
                assert key not in self.ended, "a request ended twice"
                self.ended.add(key)
                if action.request in self.handed_on:
                    self.handed_on.remove(action.request)
                else:
                    del self.waiting[key]
            elif isinstance(action, Queued):
                assert (action.request.request_id, action.request.epoch) in self.waiting

    def judge_dispatch(self, dispatch: Dispatch) -> None:
        request, worker = dispatch.request, self.workers[dispatch.decision.worker]
        key = (request.request_id, request.epoch)
        assert worker.is_up and not worker.is_draining and MODELS[worker.name] == request.model
        assert key not in self.ended
        place = self.waiting.pop(key)
        others = [other for other in self.waiting.values() if other.model == place.model]
        # By any order, those that had begun go first, as they came.
        earlier = others if self.order == "fcfs" or not place.is_new else [o for o in others if not o.is_new]
        assert all(place < other for other in earlier), "out of order"
        worker.inbox.append(request)
        assert worker.num_held <= MAX_NUM_SEQS, "a worker got more than it has room for"
        share = -(-worker.free // self.num_schedulers)
        on_the_way = sum(len(r.choices) for r in (*worker.unseen, *worker.inbox))
        is_small = len(request.choices) <= -(-MAX_NUM_SEQS // self.num_schedulers)
        assert on_the_way <= (share if is_small else worker.free), "more than this scheduler's share"


names = st.sampled_from(WORKERS)
numbers, epochs = st.integers(0, 7), st.integers(0, 2)
steps = st.one_of(
    st.tuples(st.just("request"), numbers, epochs, st.integers(1, MAX_NUM_SEQS + 1), st.integers(0, 1)),
    st.tuples(st.just("request"), numbers, epochs, st.just(1), st.just(0)),
    st.tuples(st.just("cancel"), numbers, epochs),
    st.tuples(st.sampled_from(("status", "accept", "decline", "finish")), names),
    st.tuples(st.just("status"), names, st.sampled_from(("ready", "ready", "draining"))),
    st.tuples(st.just("die"), names, st.sampled_from(("returned", "heartbeat"))),
    st.tuples(st.just("schedulers"), st.integers(1, 3)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=60), st.sampled_from(sorted(ROUTES)))
def test_every_request_has_one_end_and_no_worker_too_many(plan: list[tuple[Any, ...]], route: str) -> None:
    simulation = Simulation(route)
    simulation.run(plan)
    # What is left is handed on, and then nothing is.
    simulation.take(simulation.state.drain())
    assert not simulation.waiting
    assert simulation.state.num_waiting == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=60), st.sampled_from(sorted(ORDERS)))
def test_by_every_order_nobody_waits_while_there_is_room(plan: list[tuple[Any, ...]], order: str) -> None:
    # After each step `check` refuses a head that waits while a worker has room for it.
    simulation = Simulation("least_loaded", order)
    simulation.run(plan)
    simulation.take(simulation.state.drain())
    assert not simulation.waiting


@settings(max_examples=30, deadline=None)
@given(st.lists(steps, max_size=40), st.sampled_from(sorted(ROUTES)))
def test_the_same_events_lead_to_the_same_actions(plan: list[tuple[Any, ...]], route: str) -> None:
    first, second = Simulation(route), Simulation(route)
    first.run(plan)
    second.run(plan)
    assert first.log == second.log
