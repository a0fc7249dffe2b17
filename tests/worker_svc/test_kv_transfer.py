"""Blocks to and from real cache services over a real NATS server; and what happens when these fail."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from cache_svc.service import CacheService
from tests.support import nats, ring
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.columns import pack_u32, split_hashes
from weft.messages import BlockData, BlockGet, BlockHas, BlockHash, BlockHasReply
from weft.service import Context
from weft.settings import CacheSettings, MeshSettings
from worker_svc.engine_io import BlocksLoaded, BlocksOffloaded, Command, EngineLoad, LoadWanted, StepOutput
from worker_svc.kv_transfer import KvTransfer
from worker_svc.shards import cache_key, pick_shard

BLOCK_BYTES = 100_000
HASHES = [BlockHash(number.to_bytes(16, "big")) for number in range(64)]


def block(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK_BYTES)


class FakeEngine:
    """Keeps what it is told."""

    layout = b"fake"
    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self.load = EngineLoad()
        self.remote_cache_available = False
        self.load_bytes_per_s = 0.0
        self.answers: list[BlocksLoaded] = []
        self.num_offloaded = 0

    def start(self, on_output: Callable[[StepOutput], None]) -> None:
        """Never steps."""

    def submit(self, command: Command) -> None:
        if isinstance(command, BlocksOffloaded):
            self.num_offloaded += command.num_blocks
        else:
            assert isinstance(command, BlocksLoaded)
            self.answers.append(command)

    def stop(self) -> None:
        """Never started."""


class Worker:
    def __init__(self, transfer: KvTransfer, engine: FakeEngine) -> None:
        self.transfer, self.engine = transfer, engine

    async def offload(self, numbers: Sequence[int]) -> None:
        """Until the engine is told that none is under way."""
        before = self.engine.num_offloaded
        self.transfer.offload([(HASHES[number], block(number)) for number in numbers])
        await until(lambda: self.engine.num_offloaded >= before + len(numbers))
        assert self.done() >= self.engine.num_offloaded

    def done(self) -> float:
        stats = self.transfer.stats()
        return sum(stats[f"offload_{name}_total"] for name in ("sent", "already_held", "dropped", "failed"))

    async def load(self, numbers: Sequence[int], epoch: int = 0) -> int:
        """How many blocks came, each checked."""
        self.engine.answers.clear()
        self.transfer.load(LoadWanted("r1", epoch, tuple(HASHES[number] for number in numbers)))
        await until(lambda: self.engine.answers)
        (answer,) = self.engine.answers
        assert answer.hashes == tuple(HASHES[number] for number in numbers[: len(answer.blocks)])
        assert list(answer.blocks) == [block(number) for number in numbers[: len(answer.blocks)]]
        return len(answer.blocks)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@asynccontextmanager
async def worker(url: str, shards: Sequence[str], load_limit_s: float = 5.0, **limits: float) -> AsyncIterator[Worker]:
    engine = FakeEngine()
    bus = Bus(MeshSettings(nats_url=url), "worker", "w1-kv")
    transfer = KvTransfer(bus, engine, load_limit_s=load_limit_s, **limits)  # type: ignore[arg-type]  # sizes are whole
    await transfer.start()
    transfer.set_shards(shards)
    try:
        yield Worker(transfer, engine)
    finally:
        await transfer.stop()


@asynccontextmanager
async def caches(url: str, *names: str) -> AsyncIterator[list[CacheService]]:
    async with AsyncExitStack() as stack:
        services = []
        for name in names:
            mesh = MeshSettings(nats_url=url, instance=name)
            context = Context("cache", mesh)
            service = CacheService(CacheSettings(mesh=mesh), context)
            await stack.enter_async_context(ring.running(context, service))
            services.append(service)
        yield services


async def test_blocks_that_are_on_their_way_are_waited_for_where_another_worker_has_had_the_request(url: str) -> None:
    async with (
        caches(url, "c1"),
        worker(url, ["c1"]) as prefills,
        worker(url, ["c1"], load_limit_s=60.0, patience_s=60.0) as decodes,
    ):
        await prefills.offload(range(3))
        assert await decodes.load(range(9)) == 3, "of a new request nothing is on its way"
        loading = asyncio.create_task(decodes.load(range(9), epoch=1))
        for number in range(3, 9):
            await prefills.offload([number])
        assert await loading == 9


async def test_blocks_that_do_not_come_are_not_waited_for_any_longer(url: str) -> None:
    async with caches(url, "c1"), worker(url, ["c1"]) as other, worker(url, ["c1"], 60.0, patience_s=0.02) as waits:
        await other.offload(range(3))
        assert await waits.load(range(9), epoch=1) == 3


async def test_offloaded_blocks_are_loaded_by_another_worker(url: str) -> None:
    async with caches(url, "c1"), worker(url, ["c1"]) as first, worker(url, ["c1"]) as second:
        await first.offload(range(40))
        assert first.transfer.stats()["offload_sent_total"] == 40
        assert await second.load(range(40)) == 40
        assert first.transfer.block_load_s == 0, "it has loaded nothing"
        assert second.transfer.block_load_s == pytest.approx(BLOCK_BYTES / second.engine.load_bytes_per_s)
        second.transfer.set_shards([])
        assert second.transfer.block_load_s == 0, "nothing can be had any more"
        assert second.transfer.stats()["load_bytes_total"] == 40 * BLOCK_BYTES


async def test_blocks_are_shared_out_over_all_shards(url: str) -> None:
    names = ["c1", "c2", "c3"]
    async with caches(url, *names) as services, worker(url, names) as one:
        await one.offload(range(60))
        held = [service.stats()["memory_blocks"] for service in services]
        assert sum(held) == 60 and min(held) > 5
        assert await one.load(range(60)) == 60


async def test_what_the_cache_holds_already_is_not_sent_again(url: str) -> None:
    async with caches(url, "c1") as (service,), worker(url, ["c1"]) as one:
        await one.offload([1, 2])
        await one.offload([1, 2, 3])
        stats = one.transfer.stats()
        assert (stats["offload_sent_total"], stats["offload_already_held_total"]) == (3, 2)
        assert service.stats()["put_known_total"] == 0


async def test_a_load_ends_at_the_first_block_that_is_missing(url: str) -> None:
    async with caches(url, "c1"), worker(url, ["c1"]) as one:
        await one.offload([0, 1, 3, 4])
        assert await one.load([0, 1, 2, 3, 4]) == 2
        assert one.transfer.stats()["load_bytes_total"] == 2 * BLOCK_BYTES
        assert await one.load([2, 3, 4]) == 0


async def test_a_lost_shard_costs_its_share_only(url: str) -> None:
    async with caches(url, "c1"), worker(url, ["c1", "gone"]) as one:
        await one.offload(range(20))
        stats = one.transfer.stats()
        assert stats["offload_sent_total"] > 0 and stats["offload_failed_total"] == 20 - stats["offload_sent_total"]
        mine = [n for n in range(20) if pick_shard(cache_key(b"fake", HASHES[n]), ["c1", "gone"]) == "c1"]
        assert await one.load(mine) == len(mine)
        assert await one.load(range(20)) < 20


async def test_without_a_cache_the_engine_is_answered_at_once_with_nothing(url: str) -> None:
    async with worker(url, []) as one:
        assert not one.engine.remote_cache_available
        assert await one.load(range(4)) == 0
        await one.offload([1, 2])
        assert one.transfer.stats()["offload_dropped_total"] == 2


async def test_the_engine_knows_whether_there_is_a_cache(url: str) -> None:
    async with worker(url, ["c1"]) as one:
        assert one.engine.remote_cache_available
        one.transfer.set_shards([])
        assert not one.engine.remote_cache_available


async def test_blocks_that_come_while_others_are_sent_are_sent_too(url: str) -> None:
    async with caches(url, "c1"), worker(url, ["c1"]) as one:
        await asyncio.gather(one.offload([0]), one.offload([1, 2]), one.offload(range(3, 20)))
        assert one.transfer.stats()["offload_sent_total"] == 20


async def test_no_more_is_loaded_at_once_than_there_is_memory_for(url: str) -> None:
    async with caches(url, "c1"), worker(url, ["c1"], max_loading_bytes=3 * BLOCK_BYTES) as one:
        await one.offload(range(10))
        assert await one.load(range(10)) == 3
        # The memory is free again afterwards.
        assert await one.load(range(3, 10)) == 3


@asynccontextmanager
async def bad_cache(
    url: str, answer: Callable[[BlockGet], BlockData], delay: asyncio.Event | None = None
) -> AsyncIterator[None]:
    """A shard c1 that claims to hold everything and answers a BlockGet as told."""
    bus = Bus(MeshSettings(nats_url=url), "cache", "c1")
    await bus.connect()

    async def reply(question: BlockHas | BlockGet) -> BlockHasReply | BlockData:
        if isinstance(question, BlockHas):
            return BlockHasReply(bytes([1] * (len(question.keys) // 16)))
        if delay is not None:
            await delay.wait()
        return answer(question)

    await bus.answer(subjects.cache("c1"), BlockHas | BlockGet, reply)  # type: ignore[arg-type]  # a union
    await bus.flush()
    try:
        yield
    finally:
        await bus.close()


def answer_with(make: Callable[[int], tuple[bytes, int]]) -> Callable[[BlockGet], BlockData]:
    """A BlockData of (bytes, checksum) made for each block's number."""
    numbers = {cache_key(b"fake", block_hash): number for number, block_hash in enumerate(HASHES)}

    def answer(question: BlockGet) -> BlockData:
        made = [make(numbers[key]) for key in split_hashes(question.keys)]
        return BlockData(question.keys, [data for data, _ in made], pack_u32([checksum for _, checksum in made]))

    return answer


def whole(number: int) -> tuple[bytes, int]:
    return block(number), zlib.crc32(block(number))


def torn(number: int) -> tuple[bytes, int]:
    data, checksum = whole(number)
    return (data[:-1] + b"x", checksum) if number == 2 else (data, checksum)


def short(number: int) -> tuple[bytes, int]:
    return whole(number) if number < 2 else (b"short", zlib.crc32(b"short"))


@pytest.mark.parametrize("make", [torn, short])
async def test_a_block_that_is_not_right_ends_the_load_before_it(
    url: str, make: Callable[[int], tuple[bytes, int]]
) -> None:
    async with bad_cache(url, answer_with(make)), worker(url, ["c1"]) as one:
        assert await one.load(range(5)) == 2
        assert one.transfer.stats()["load_corrupt_total"] >= 1


async def test_a_cache_that_does_not_answer_costs_no_more_than_the_limit(url: str) -> None:
    never = asyncio.Event()
    async with bad_cache(url, answer_with(whole), never), worker(url, ["c1"], load_limit_s=0.2) as one:
        assert await one.load(range(40)) == 0
        assert one.transfer.stats()["load_failed_total"] > 0
        never.set()


async def test_answers_for_keys_never_asked_are_not_believed(url: str) -> None:
    def answer(question: BlockGet) -> BlockData:
        data, checksum = whole(0)
        return BlockData(bytes(16), [data], pack_u32([checksum]))

    async with bad_cache(url, answer), worker(url, ["c1"]) as one:
        assert await one.load([0, 1]) == 0
