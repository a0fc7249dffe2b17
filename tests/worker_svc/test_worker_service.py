"""The worker's shell on a real NATS server, with the null engine: every promise that the ring relies on."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cache_svc.service import CacheService
from tests.support import nats, ring
from tests.support.ring import Neighbours, make_request
from tests.support.wait import until
from weft import model_folder, subjects
from weft.columns import unpack_u32
from weft.hashing import BLOCK_SIZE
from weft.messages import FINISH_LENGTH, HEARTBEAT_TIMEOUT_S, Assignment, Control, Heartbeat, KvEvents, TokenizedRequest
from weft.service import Context
from weft.settings import CacheSettings, MeshSettings, ModelSettings, WorkerSettings, to_environ
from worker_svc.engine_io import Add
from worker_svc.service import WorkerService

ENDLESS = 2000  # tokens, of a stream that a test ends


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture
async def near(url: str) -> AsyncIterator[Neighbours]:
    async with ring.neighbours(url) as both:
        yield both


@asynccontextmanager
async def worker(url: str, *, drain_s: float = 5.0, **more: object) -> AsyncIterator[Context]:
    mesh = MeshSettings(nats_url=url, instance="w1", drain_s=drain_s)
    options: dict[str, object] = {"null_tokens_per_s": 1000.0, **more}
    settings = WorkerSettings(mesh=mesh, model=ModelSettings(), engine="null", **options)  # type: ignore[arg-type]
    context = Context("worker", mesh)
    async with ring.running(context, WorkerService(settings, context)):
        yield context


async def test_an_assignment_becomes_frames_and_a_finish(url: str, near: Neighbours) -> None:
    async with worker(url):
        near.assign("w1", make_request(max_tokens=20))
        await until(near.finishes)
        assert near.finishes() == {0: FINISH_LENGTH}
        assert len(near.tokens(0)) == 20
        assert near.kinds() == ["started"]
        assert near.events[0].num_prompt_tokens == 3
        assert {"worker", "started"} <= set(near.events[0].stamps)
        assert [frame.sequence for frame in near.frames] == list(range(len(near.frames)))


async def test_status_tells_what_is_held_and_what_was_ever_taken(url: str, near: Neighbours) -> None:
    async with worker(url):
        near.assign("w1", make_request(max_tokens=ENDLESS, slots=(0, 1)))
        await until(lambda: near.statuses and near.statuses[-1].num_running == 2)
        assert near.statuses[-1].accepted == {"s1": 2}
        near.cancel("r1")
        await until(lambda: near.statuses[-1].num_running + near.statuses[-1].num_waiting == 0)
        assert near.statuses[-1].accepted == {"s1": 2}
        assert near.statuses[-1].state == "ready"
    await until(lambda: near.statuses[-1].state == "draining")


async def test_a_full_worker_hands_the_assignment_back_to_its_scheduler(url: str, near: Neighbours) -> None:
    async with worker(url, max_num_seqs=2):
        near.assign("w1", make_request("r1", max_tokens=ENDLESS, slots=(0, 1)))
        near.assign("w1", make_request("r2", slots=(2,)))
        await until(lambda: near.declined)
        assert near.declined[0].request.request_id == "r2"
        assert near.declined[0].worker == "w1"
        await until(lambda: near.statuses and near.statuses[-1].accepted == {"s1": 2})
        near.cancel("r1")


async def test_an_empty_worker_takes_more_choices_than_it_has_room_for(url: str, near: Neighbours) -> None:
    async with worker(url, max_num_seqs=2):
        near.assign("w1", make_request(slots=(0, 1, 2)))
        await until(lambda: len(near.finishes()) == 3)


async def test_what_cannot_be_handed_back_is_told_to_the_gateway(url: str, near: Neighbours) -> None:
    async with worker(url, max_num_seqs=1):
        near.assign("w1", make_request("r1", max_tokens=ENDLESS))
        await until(lambda: near.kinds("r1"))
        # From a scheduler that has died in the meantime.
        near.gateway_bus.send(subjects.assign("w1"), Assignment(make_request("r2", slots=(1,)), "gone"))
        await until(lambda: near.kinds("r2") == ["lost"])
        near.cancel("r1")


async def test_a_cancel_frees_what_the_request_held(url: str, near: Neighbours) -> None:
    async with worker(url):
        near.assign("w1", make_request(max_tokens=ENDLESS))
        await until(lambda: near.statuses and near.statuses[-1].num_running == 1)
        free = near.statuses[-1].num_blocks
        near.cancel("r1")
        await until(lambda: near.statuses[-1].num_free_blocks == free and near.statuses[-1].num_running == 0)
        assert not near.finishes()


async def test_a_cancel_of_one_choice_lets_the_others_go_on(url: str, near: Neighbours) -> None:
    async with worker(url, null_tokens_per_s=100.0):
        near.assign("w1", make_request(max_tokens=30, slots=(0, 1)))
        await until(near.frames.__len__)
        near.cancel("r1", slots=(1,))
        await until(near.finishes)
        assert near.finishes() == {0: FINISH_LENGTH}
        assert len(near.tokens(1)) < 30


async def test_an_assignment_that_comes_after_its_cancel_is_dropped(url: str, near: Neighbours) -> None:
    async with worker(url):
        near.cancel("r1", epoch=1)
        await near.gateway_bus.flush()
        near.assign("w1", make_request("r1", epoch=1))
        near.assign("w1", make_request("r2", slots=(1,)))
        await until(near.finishes)
        assert near.kinds("r1") == []
        # It is under way no more, so the scheduler gets its credit back.
        await until(lambda: near.statuses[-1].accepted == {"s1": 2})
        near.assign("w1", make_request("r1", epoch=2, slots=(2,)))
        await until(lambda: 2 in near.finishes())


async def test_a_higher_epoch_ends_the_lower_one(url: str, near: Neighbours) -> None:
    async with worker(url, max_num_seqs=1):
        near.assign("w1", make_request(max_tokens=ENDLESS))
        await until(near.frames.__len__)
        near.assign("w1", make_request(epoch=1, max_tokens=5))
        near.assign("w1", make_request(epoch=0, max_tokens=5))
        await until(near.finishes)
        assert len(near.tokens(0, epoch=1)) == 5
        assert not near.declined


async def test_a_request_that_the_model_cannot_serve_is_rejected(url: str, near: Neighbours) -> None:
    async with worker(url):
        near.assign("w1", make_request(prompt=[10**6]))
        await until(lambda: near.kinds() == ["rejected"])
        error = near.events[0].error
        assert error is not None and error.code == "invalid_request" and "vocabulary" in error.message
        await until(lambda: near.statuses and near.statuses[-1].accepted == {"s1": 1})
        assert near.statuses[-1].num_waiting == 0


async def test_bytes_that_are_no_assignment_are_refused_to_their_sender(url: str, near: Neighbours) -> None:
    async with worker(url):
        reply = subjects.returned("scheduler", "s1", "g1", "r1", 0)
        near.scheduler_bus.publish(subjects.assign("w1"), b"\xc1 nonsense", reply=reply)
        await until(lambda: near.returned)
        assert near.returned[0][0].request_id == "r1"
        assert near.returned[0][1].code == "decode_error"


async def test_a_gateway_reported_dead_has_its_requests_dropped(url: str, near: Neighbours) -> None:
    async with worker(url):
        near.beat()
        await near.gateway_bus.flush()
        near.assign("w1", make_request(max_tokens=ENDLESS))
        await until(lambda: near.statuses and near.statuses[-1].num_running == 1)
        near.beat(state="dead")
        await until(lambda: near.statuses[-1].num_running == 0)


async def test_a_silent_gateway_has_its_requests_dropped(url: str, near: Neighbours) -> None:
    async with worker(url, null_first_token_s=100.0, drain_s=0.0):
        near.beat()
        await near.gateway_bus.flush()
        near.assign("w1", make_request())
        await until(lambda: near.statuses and near.statuses[-1].num_running == 1)
        await until(lambda: near.statuses[-1].num_running == 0)


async def test_an_outage_of_nats_longer_than_any_timeout_drops_nothing(tmp_path: Path) -> None:
    server = nats.start(folder=tmp_path)
    try:
        async with (
            ring.neighbours(server.url) as near,
            worker(server.url, null_first_token_s=100.0, drain_s=0.0) as context,
        ):
            near.beat()
            await near.gateway_bus.flush()
            near.assign("w1", make_request())
            await until(lambda: near.claims)
            server.process.kill()
            server.process.wait()
            cut_off = time.monotonic()
            await until(lambda: not context.bus.connected and time.monotonic() - cut_off > 2 * HEARTBEAT_TIMEOUT_S)
            server = nats.start(port=server.port, folder=tmp_path)
            before = len(near.claims)
            await until(lambda: near.gateway_bus.connected)
            near.beat()
            await until(lambda: len(near.claims) > before + 1)
            assert near.claims[-1].request_ids == ["r1"]
            assert near.statuses[-1].num_running == 1
    finally:
        server.process.kill()
        server.process.wait()


async def test_requests_of_a_gateway_that_was_never_heard_are_dropped(url: str, near: Neighbours) -> None:
    async with worker(url, null_first_token_s=100.0, drain_s=0.0):
        near.assign("w1", make_request())
        await until(lambda: near.claims)
        await until(lambda: near.statuses[-1].num_running == 0)


async def test_what_is_held_is_claimed(url: str, near: Neighbours) -> None:
    async with worker(url, null_first_token_s=100.0, drain_s=0.0):
        near.assign("w1", make_request("r1", epoch=4))
        await until(lambda: near.claims)
        assert near.claims[-1].request_ids == ["r1"]
        assert unpack_u32(near.claims[-1].epochs) == [4]


async def test_an_engine_that_stands_still_is_not_live_and_claims_nothing(url: str, near: Neighbours) -> None:
    async with worker(url, null_first_token_s=100.0, engine_stall_s=0.1, drain_s=0.0) as context:
        beats: list[Heartbeat] = []
        await near.gateway_bus.on(subjects.alive("worker", "w1"), Heartbeat, beats.append)
        near.assign("w1", make_request())
        await until(lambda: near.statuses and near.statuses[-1].num_running == 1)
        steady = len(near.statuses) + 3
        await until(lambda: len(near.statuses) >= steady)
        seen = len(beats), len(near.claims)
        await until(lambda: len(near.statuses) >= steady + 2)
        assert (len(beats), len(near.claims)) == seen
        assert context.state == "ready"


async def test_a_worker_whose_engine_fails_dies_and_hands_nothing_on(url: str, near: Neighbours) -> None:
    mesh = MeshSettings(nats_url=url, instance="w1")
    context = Context("worker", mesh)
    service = WorkerService(WorkerSettings(mesh=mesh, model=ModelSettings(), engine="null"), context)
    beats: list[Heartbeat] = []
    await near.gateway_bus.on(subjects.alive("worker", "w1"), Heartbeat, beats.append)
    with pytest.raises(AttributeError):
        async with ring.running(context, service) as process:
            near.assign("w1", make_request(max_tokens=ENDLESS))
            await until(near.frames.__len__)
            assert service._engine is not None
            service._engine.submit(Add(None))  # type: ignore[arg-type]  # as good as a machine that fails
            await asyncio.wait({process}, timeout=10)
    await until(lambda: beats[-1].state == "dead")
    # Handed on, the request would take the next worker with it, and the next: nobody would count the deaths.
    assert near.kinds() == ["started"]


async def test_a_drain_lets_what_runs_finish(url: str, near: Neighbours) -> None:
    async with worker(url, null_tokens_per_s=100.0) as context:
        near.assign("w1", make_request(max_tokens=30))
        await until(near.frames.__len__)
        context.stop()
        await until(lambda: near.statuses[-1].state == "draining")
        near.assign("w1", make_request("r2", slots=(1,)))
        await until(lambda: near.declined)
        assert near.declined[0].worker == "w1"
    assert near.finishes() == {0: FINISH_LENGTH}
    assert "lost" not in near.kinds()


async def test_what_does_not_finish_before_the_deadline_is_handed_on(url: str, near: Neighbours) -> None:
    async with worker(url, null_first_token_s=100.0, drain_s=0.05):
        near.assign("w1", make_request("r1"))
        near.assign("w1", make_request("r2", slots=(1,)))
        await until(lambda: near.statuses and near.statuses[-1].num_running == 2)
    await until(lambda: near.kinds("r1")[-1:] == near.kinds("r2")[-1:] == ["lost"])


async def test_a_snapshot_is_numbered_like_the_last_events(url: str, near: Neighbours) -> None:
    async with worker(url):
        snapshot = await near.scheduler_bus.ask(
            subjects.control("worker", "w1"), Control("kv_snapshot"), KvEvents, timeout_s=5
        )
        assert snapshot.snapshot and snapshot.sequence == 0


def process_environ(url: str, model: str) -> dict[str, str]:
    mesh = MeshSettings(nats_url=url, instance="w3")
    settings = WorkerSettings(mesh=mesh, model=ModelSettings(model=model), engine="null")
    return {**os.environ, **to_environ(settings)}


async def test_a_folder_that_cannot_be_served_ends_the_process_with_one_sentence(url: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker_svc", env=process_environ(url, str(tmp_path)), stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    last = stderr.decode().splitlines()[-1]
    assert last.startswith("worker_svc: ") and "max_position_embeddings" in last
    assert b"Traceback" not in stderr


async def test_a_process_ends_with_0_when_told_to(url: str, near: Neighbours) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "worker_svc", env=process_environ(url, "tales-6m")
    )
    try:
        await until(lambda: any(status.worker == "w3" for status in near.statuses), timeout_s=30)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def torch_worker(url: str, instance: str) -> AsyncIterator[WorkerService]:
    mesh = MeshSettings(nats_url=url, instance=instance, drain_s=5.0)
    # Plain torch: others are compiled at their first use, which may take longer than a test waits.
    settings = WorkerSettings(
        mesh=mesh, model=ModelSettings(model="tales-1m"), kernels="torch", threads=1, kv_memory=64 * 2**20
    )
    context = Context("worker", mesh)
    service = WorkerService(settings, context)
    async with ring.running(context, service):
        yield service


@asynccontextmanager
async def cache(url: str) -> AsyncIterator[CacheService]:
    mesh = MeshSettings(nats_url=url, instance="c1")
    context = Context("cache", mesh)
    service = CacheService(CacheSettings(mesh=mesh), context)
    async with ring.running(context, service):
        yield service


async def test_a_fresh_worker_goes_on_from_the_blocks_of_one_that_is_gone(url: str, near: Neighbours) -> None:
    digest = model_folder.digest(model_folder.read(ModelSettings(model="tales-1m")))
    prompt = [300 + i * 7 % 1000 for i in range(203)]

    def request(request_id: str, slot: int) -> TokenizedRequest:
        return make_request(
            request_id, prompt=prompt, slots=[slot], max_tokens=12, model="tales-1m", model_digest=digest
        )

    async with cache(url) as kept, near.beating():
        async with torch_worker(url, "w1") as first:
            await until(lambda: first.stats()["kv_shards"] == 1)
            near.assign("w1", request("r1", 0))
            await until(lambda: 0 in near.finishes(), timeout_s=30)
            await until(lambda: kept.stats()["memory_blocks"] >= 203 // BLOCK_SIZE)
        async with torch_worker(url, "w2") as second:
            await until(lambda: second.stats()["kv_shards"] == 1)
            near.assign("w2", request("r2", 1))
            await until(lambda: 1 in near.finishes(), timeout_s=30)
            (started,) = [event for event in near.events if (event.request_id, event.kind) == ("r2", "started")]
            assert started.num_cached_tokens == 203 // BLOCK_SIZE * BLOCK_SIZE
            assert second.stats()["kv_load_bytes_per_s"] > 0
    assert near.tokens(1) == near.tokens(0) and len(near.tokens(1)) == 12


async def test_without_a_cache_service_a_worker_computes(url: str, near: Neighbours) -> None:
    digest = model_folder.digest(model_folder.read(ModelSettings(model="tales-1m")))
    async with near.beating(), torch_worker(url, "w1") as service:
        near.assign("w1", make_request(prompt=range(300, 400), model="tales-1m", model_digest=digest))
        await until(near.finishes, timeout_s=30)
        assert near.finishes() == {0: FINISH_LENGTH}
        assert service.stats()["kv_offload_offered_total"] == 0
        # Its blocks are news for the schedulers all the same.
        snapshot = service.snapshot()
        assert snapshot is not None and len(snapshot.stored) == 16 * (102 // BLOCK_SIZE)
