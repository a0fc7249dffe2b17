"""The scheduler's shell on a real NATS server, among workers, gateways and tokenizers played by the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scheduler_svc.cost_model import CostModel
from scheduler_svc.hardware import Hardware
from scheduler_svc.service import SchedulerService
from tests.support import nats, ring
from tests.support.scheduling import MODEL, block, make_events, make_request, make_status
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.messages import (
    Assignment,
    BacklogPlace,
    Cancel,
    Claims,
    Control,
    ControlReply,
    Decisions,
    Declined,
    Heartbeat,
    KvEvents,
    Message,
    Role,
    State,
    StreamEvent,
    TokenizedRequest,
)
from weft.service import Context
from weft.settings import MeshSettings, SchedulerSettings


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


class FakeWorker:
    """Speaks a worker's messages; what it says and when is the test's business."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.name = bus.instance
        self.got: list[Assignment] = []
        self.held: list[int] = []  # blocks, for snapshots
        self.kv_sequence = 0

    async def listen(self) -> None:
        async def answer(control: Control) -> Message:
            if control.verb != "kv_snapshot":
                return ControlReply("ready")
            return make_events(self.kv_sequence, self.held, holder=self.name, snapshot=True)

        await self.bus.on(subjects.assign(self.name), Assignment, self.got.append)
        await self.bus.answer(subjects.control("worker", self.name), Control, answer)
        await self.bus.flush()

    def status(self, **changes: Any) -> None:
        changes.setdefault("kv_sequence", self.kv_sequence)
        self.bus.send(subjects.status(self.name), make_status(self.name, **changes))

    def decline(self, assignment: Assignment) -> None:
        declined = Declined(assignment.request, self.name)
        self.bus.send(subjects.declined(assignment.scheduler), declined)

    def ids(self) -> list[str]:
        return [assignment.request.request_id for assignment in self.got]


class Neighbours:
    """A gateway, a tokenizer and any number of workers."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self._url = url
        self._stack = stack
        self.events: list[StreamEvent] = []
        self.decisions: list[Decisions] = []
        self.claims: list[Claims] = []

    async def bus(self, role: Role, instance: str) -> Bus:
        bus = Bus(MeshSettings(nats_url=self._url), role, instance)
        await bus.connect()
        self._stack.push_async_callback(bus.close)
        return bus

    async def start(self) -> None:
        def on_event(message: StreamEvent | Decisions | Claims) -> None:
            match message:
                case StreamEvent():
                    self.events.append(message)
                case Decisions():
                    self.decisions.append(message)
                case Claims():
                    self.claims.append(message)

        self.gateway = await self.bus("gateway", "g0")
        await self.gateway.on(subjects.events("g0"), StreamEvent | Decisions | Claims, on_event)  # type: ignore[arg-type]  # a union
        await self.gateway.flush()
        self.tokenizer = await self.bus("tokenizer", "t0")

    async def worker(self, name: str, **status: Any) -> FakeWorker:
        worker = FakeWorker(await self.bus("worker", name))
        await worker.listen()
        worker.status(**status)
        await worker.bus.flush()
        return worker

    def beat(self, role: Role, instance: str, state: State = "ready") -> None:
        self.gateway.send(subjects.alive(role, instance), Heartbeat(role, instance, 1, state))

    def schedule(self, *requests: TokenizedRequest) -> None:
        for request in requests:
            reply = subjects.returned("tokenizer", "t0", request.gateway, request.request_id, request.epoch)
            self.tokenizer.send(subjects.schedule(request.model), request, reply=reply)

    def kinds(self, request_id: str) -> list[str]:
        return [event.kind for event in self.events if event.request_id == request_id]


@pytest.fixture
async def near(url: str) -> AsyncIterator[Neighbours]:
    async with AsyncExitStack() as stack:
        neighbours = Neighbours(url, stack)
        await neighbours.start()
        yield neighbours


@asynccontextmanager
async def scheduler(url: str, instance: str = "s0", **more: Any) -> AsyncIterator[SchedulerService]:
    settings = SchedulerSettings(mesh=MeshSettings(nats_url=url, instance=instance, drain_s=5.0), **more)
    context = Context("scheduler", settings.mesh)
    service = SchedulerService(settings, context)
    async with ring.running(context, service):
        yield service


async def with_workers(service: SchedulerService, count: int) -> None:
    await until(lambda: service.stats()["workers"] == count)


async def test_request_goes_to_a_worker_stamped_and_nobody_else_hears_of_it(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        worker = await near.worker("w0")
        await with_workers(service, 1)
        near.schedule(make_request("r0", blocks=[1, 2]))
        await until(lambda: worker.got)
        (assignment,) = worker.got
        assert assignment.scheduler == "s0"
        assert assignment.request.request_id == "r0"
        assert assignment.request.stamps["scheduler"] > 0
        await near.gateway.flush()
        assert near.events == []
        assert service.models() == [MODEL]


async def test_a_calibration_says_what_work_costs(url: str, near: Neighbours, tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_bytes(
        msgspec.json.encode(Hardware("slow", CostModel(token_s=1.0), kv_tokens=1000, kv_bytes_per_token=1))
    )
    async with scheduler(url, cost_file=str(path), slo="ttft=20") as service:
        await near.worker("w0")
        await with_workers(service, 1)
        near.schedule(make_request("short", blocks=[1]), make_request("long", blocks=[1, 2]))
        await until(lambda: near.kinds("long"))
        assert (near.kinds("short"), near.kinds("long")) == ([], ["rejected"])


async def test_what_loading_a_block_took_a_worker_lets_requests_go_where_their_prefix_is_not(
    url: str, near: Neighbours
) -> None:
    async with scheduler(url, route="min_ttft") as service:
        idle = await near.worker("w0", prefill_tokens_per_s=1000.0, block_load_s=0.0001)
        holder = await near.worker("w1", prefill_tokens_per_s=1000.0, num_waiting_tokens=150)
        holder.bus.send(subjects.kv("w1"), make_events(1, range(10), holder="w1"))
        await with_workers(service, 2)
        await until(lambda: service.stats()["blocks"] == 10)
        # 160 tokens would take 160 ms, and 10 blocks take 1 ms.
        near.schedule(make_request("r0", blocks=range(10)))
        await until(lambda: near.decisions)
        decision = near.decisions[0].placed[0].decision
        assert (decision.worker, decision.rule) == ("w0", "fetch")
        assert decision.expected_ttft_s == pytest.approx(0.001)
        assert idle.ids() == ["r0"]


async def test_gateway_is_told_of_decisions_together_and_with_their_candidates(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        worker = await near.worker("w0")
        await with_workers(service, 1)
        near.schedule(make_request("r0", blocks=[1, 2]), make_request("r1"))
        await until(lambda: near.decisions)
        (told,) = near.decisions
        assert [placed.request_id for placed in told.placed] == ["r0", "r1"] == worker.ids()
        decision = told.placed[0].decision
        assert (decision.worker, decision.policy, decision.num_prompt_blocks) == ("w0", "least_prefill", 2)
        assert [score.worker for score in decision.scores] == ["w0"]
        assert told.placed[0].stamps == worker.got[0].request.stamps


async def test_request_waits_for_a_worker_claimed_and_announced(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        near.beat("gateway", "g0")
        near.schedule(make_request("r0"))
        await until(lambda: near.kinds("r0") == ["queued"])
        await until(lambda: len(near.claims) >= 2)
        assert near.claims[0].request_ids == ["r0"]
        assert near.events[0].place == BacklogPlace(1, 0, "predicted_reject", "fcfs")
        assert (near.claims[0].role, near.claims[0].instance) == ("scheduler", "s0")
        worker = await near.worker("w0")
        await until(lambda: worker.got)
        assert service.stats()["waiting_requests"] == 0


async def test_worker_gets_no_more_than_its_room(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        worker = await near.worker("w0", max_num_seqs=3)
        await with_workers(service, 1)
        near.schedule(*[make_request(f"r{number}") for number in range(5)])
        await until(lambda: service.stats()["waiting_requests"] == 2)
        await until(lambda: len(worker.got) == 3)
        worker.status(max_num_seqs=3, num_running=2, accepted={"s0": 3})
        await until(lambda: len(worker.got) == 4)
        assert worker.ids() == ["r0", "r1", "r2", "r3"]


async def test_declined_request_goes_to_another_worker(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        first = await near.worker("w0")
        await with_workers(service, 1)
        near.schedule(make_request("r0"))
        await until(lambda: first.got)
        second = await near.worker("w1", num_running=3)
        await with_workers(service, 2)
        first.decline(first.got[0])
        await until(lambda: second.got)
        assert second.got[0].request.request_id == "r0"


async def test_dead_worker_is_noticed_by_its_silence_on_an_assignment(url: str, near: Neighbours) -> None:
    async with scheduler(url, route="least_loaded") as service:
        ghost = await near.bus("worker", "w-ghost")
        ghost.send(subjects.status("w-ghost"), make_status("w-ghost"))
        worker = await near.worker("w1", num_running=2)
        await with_workers(service, 2)
        near.schedule(make_request("r0"))
        await until(lambda: worker.got)
        assert service.stats()["returned_total"] == 1
        assert service.stats()["workers"] == 1


async def test_what_was_on_its_way_to_a_worker_announced_dead_is_handed_on(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        first = await near.worker("w0")
        near.beat("worker", "w0")
        await with_workers(service, 1)
        near.schedule(make_request("r0"))
        await until(lambda: first.got)
        near.beat("worker", "w0", "dead")
        await until(lambda: near.kinds("r0") == ["lost"])


async def test_full_backlog_is_answered_with_the_time_to_come_back(url: str, near: Neighbours) -> None:
    async with scheduler(url, max_queued_requests=2) as service:
        await near.worker("w0", max_num_seqs=1, num_running=1, prefill_tokens_per_s=10.0)
        await with_workers(service, 1)
        near.schedule(*[make_request(f"r{number}", num_tokens=100) for number in range(3)])
        await until(lambda: near.kinds("r2") == ["rejected"])
        (event,) = [event for event in near.events if event.request_id == "r2"]
        assert event.error is not None
        assert (event.error.code, event.error.retry_after_s) == ("overloaded", 20.0)
        assert near.kinds("r0") == near.kinds("r1") == ["queued"]


async def test_more_choices_than_any_worker_runs_are_rejected(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        await near.worker("w0")
        await with_workers(service, 1)
        near.schedule(make_request("r0", num_choices=5))
        await until(lambda: near.kinds("r0") == ["rejected"])
        error = near.events[0].error
        assert error is not None and (error.code, error.param) == ("invalid_request", "n")


async def test_cancel_and_the_gateways_death_empty_the_backlog(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        near.beat("gateway", "g0")
        near.schedule(*[make_request(f"r{number}") for number in range(3)])
        await until(lambda: service.stats()["waiting_requests"] == 3)
        near.gateway.send(subjects.CANCEL, Cancel("r1", 0, "g0"))
        await until(lambda: service.stats()["waiting_requests"] == 2)
        near.beat("gateway", "g0", "dead")
        await until(lambda: service.stats()["waiting_requests"] == 0)
        assert service.stats()["dropped_total"] == 3


async def test_requests_follow_their_prefix_learnt_from_events_and_snapshots(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        workers = [await near.worker(f"w{number}", max_num_seqs=64) for number in range(3)]
        await with_workers(service, 3)
        # One tells by events, one only when asked, since its events were before this scheduler's time.
        workers[1].bus.send(subjects.kv("w1"), make_events(1, [1, 2, 3], holder="w1"))
        workers[2].held, workers[2].kv_sequence = [7, 8, 9], 41
        workers[2].status(max_num_seqs=64)
        workers[2].bus.send(subjects.kv("w2"), make_events(42, [10], holder="w2"))
        await until(lambda: service.stats()["blocks"] == 7)
        near.schedule(make_request("a", blocks=[1, 2, 3]), make_request("b", blocks=[7, 8, 9, 10]))
        await until(lambda: workers[1].got and workers[2].got)
        assert (workers[1].ids(), workers[2].ids()) == (["a"], ["b"])
        assert service.stats()["matched_blocks_total"] == 7


async def test_blocks_of_a_cache_are_no_workers_business(url: str, near: Neighbours) -> None:
    async with scheduler(url) as service:
        cache = await near.bus("cache", "cache-0")
        cache.send(subjects.kv("cache-0"), KvEvents("cache-0", 1, 5, block(1)))
        await near.worker("w0")
        await with_workers(service, 1)
        assert service.stats()["blocks"] == 0


async def test_two_schedulers_share_a_workers_room(url: str, near: Neighbours) -> None:
    async with scheduler(url, "s0") as first, scheduler(url, "s1") as second:
        await until(lambda: first.stats()["schedulers"] == second.stats()["schedulers"] == 2)
        worker = await near.worker("w0", max_num_seqs=8)
        await with_workers(first, 1)
        await with_workers(second, 1)
        near.schedule(*[make_request(f"r{number}") for number in range(40)])
        await until(lambda: first.stats()["requests_total"] + second.stats()["requests_total"] == 40)
        await until(lambda: len(worker.got) == 8)
        assert first.stats()["dispatched_total"] == second.stats()["dispatched_total"] == 4
        assert first.stats()["waiting_requests"] + second.stats()["waiting_requests"] == 32


async def test_drain_hands_the_backlog_on_at_once(url: str, near: Neighbours) -> None:
    async with scheduler(url):
        near.schedule(make_request("r0"), make_request("r1"))
        await until(lambda: near.kinds("r0") == near.kinds("r1") == ["queued"])
    await until(lambda: near.kinds("r0") == near.kinds("r1") == ["queued", "lost"])
    error = near.events[-1].error
    assert error is not None and error.code == "unavailable"
