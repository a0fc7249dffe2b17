"""The cache service over a real NATS server, with a real disk and real kills."""

from __future__ import annotations

import asyncio
import os
import sys
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cache_svc.service import CacheService
from tests.support import nats, ring
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.columns import pack_u32, split_hashes
from weft.errors import DecodeError, WeftError
from weft.messages import BlockData, BlockGet, BlockHas, BlockHasReply, BlockPut, Control, ControlReply, Heartbeat
from weft.service import Context
from weft.settings import CacheSettings, MeshSettings, to_environ

SIZE = 10_000  # bytes of a block
NO_LIMIT = 2**22


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture
async def worker(url: str) -> AsyncIterator[Worker]:
    bus = Bus(MeshSettings(nats_url=url), "worker", "w1-kv")
    await bus.connect()
    yield Worker(bus)
    await bus.close()


class Worker:
    """Asks the shard c1."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def put(self, numbers: Sequence[int], *, size: int = SIZE, checksum_error: int = 0) -> list[int]:
        blocks = [data(number, size) for number in numbers]
        checksums = pack_u32([zlib.crc32(block) ^ checksum_error for block in blocks])
        message = BlockPut(keys(numbers), blocks, checksums)
        return list((await self.bus.ask(subjects.cache("c1"), message, BlockHasReply, timeout_s=5)).held)

    async def has(self, numbers: Sequence[int]) -> list[int]:
        return list(
            (await self.bus.ask(subjects.cache("c1"), BlockHas(keys(numbers)), BlockHasReply, timeout_s=5)).held
        )

    async def get(self, numbers: Sequence[int], max_bytes: int = NO_LIMIT) -> list[int]:
        """The numbers of the blocks that came, each checked."""
        reply = await self.bus.ask(subjects.cache("c1"), BlockGet(keys(numbers), max_bytes), BlockData, timeout_s=5)
        got = [int.from_bytes(key, "big") for key in split_hashes(reply.keys)]
        assert [len(block) for block in reply.blocks] == [SIZE] * len(got)
        assert reply.blocks == [data(number) for number in got]
        assert reply.checksums == pack_u32([zlib.crc32(block) for block in reply.blocks])
        return got

    async def stats(self) -> dict[str, float]:
        reply = await self.bus.ask(subjects.control("cache", "c1"), Control("stats"), ControlReply, timeout_s=5)
        return reply.stats


def keys(numbers: Sequence[int]) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in numbers)


def data(number: int, size: int = SIZE) -> bytes:
    return bytes([number % 256]) * size


@asynccontextmanager
async def cache(url: str, path: Path | None = None, **sizes: int) -> AsyncIterator[CacheService]:
    mesh = MeshSettings(nats_url=url, instance="c1", drain_s=5.0)
    settings = CacheSettings(mesh=mesh, disk_path=str(path) if path else "", **sizes)
    context = Context("cache", mesh)
    service = CacheService(settings, context)
    async with ring.running(context, service):
        yield service


async def test_what_is_put_is_had_and_got_in_the_order_asked(url: str, worker: Worker) -> None:
    async with cache(url):
        assert await worker.put([1, 2, 3]) == [1, 1, 1]
        assert await worker.has([3, 4, 1]) == [1, 0, 1]
        assert await worker.get([3, 4, 1]) == [3, 1]
        assert await worker.put([3, 4]) == [1, 1]
        stats = await worker.stats()
        assert (stats["put_total"], stats["put_known_total"]) == (4, 1)
        assert (stats["asked_total"], stats["hits_memory_total"]) == (3, 2)


async def test_a_block_with_a_wrong_checksum_is_not_kept(url: str, worker: Worker) -> None:
    async with cache(url):
        assert await worker.put([1], checksum_error=1) == [0]
        assert await worker.has([1]) == [0]
        assert (await worker.stats())["put_corrupt_total"] == 1


async def test_a_block_larger_than_every_budget_is_refused(url: str, worker: Worker, tmp_path: Path) -> None:
    async with cache(url, tmp_path, memory_size=SIZE - 1, disk_size=SIZE):
        assert await worker.put([1]) == [0]
        assert (await worker.stats())["put_refused_total"] == 1


async def test_memory_stays_within_its_budget_least_recently_used_out_first(url: str, worker: Worker) -> None:
    async with cache(url, memory_size=3 * SIZE):
        await worker.put([1, 2, 3])
        await worker.get([1])
        await worker.put([4])
        assert await worker.has([1, 2, 3, 4]) == [1, 0, 1, 1]
        assert (await worker.stats())["memory_bytes"] == 3 * SIZE


async def test_an_answer_holds_no_more_bytes_than_asked_for(url: str, worker: Worker, tmp_path: Path) -> None:
    async with cache(url, tmp_path, memory_size=2 * SIZE):
        await worker.put([1, 2, 3, 4, 5])
        await until_written(worker, 5)
        assert await worker.get([1, 2, 3, 4, 5], max_bytes=4 * SIZE) == [1, 2, 3, 4]
        assert await worker.get([1, 2], max_bytes=SIZE - 1) == []


async def test_what_memory_has_no_room_for_comes_from_disk_and_back_into_memory(
    url: str, worker: Worker, tmp_path: Path
) -> None:
    async with cache(url, tmp_path, memory_size=2 * SIZE):
        await worker.put([1, 2, 3, 4])
        await until_written(worker, 4)
        assert await worker.get([1, 2]) == [1, 2]
        assert (await worker.stats())["hits_disk_total"] == 2
        assert await worker.get([1, 2]) == [1, 2]
        assert (await worker.stats())["hits_memory_total"] == 2


async def test_without_memory_the_disk_alone_serves(url: str, worker: Worker, tmp_path: Path) -> None:
    async with cache(url, tmp_path, memory_size=0):
        assert await worker.put([1, 2]) == [1, 1]
        assert await worker.get([2, 1]) == [2, 1]
        await until_written(worker, 2)
        assert await worker.get([2, 1]) == [2, 1]


async def test_damage_on_disk_is_a_miss(url: str, worker: Worker, tmp_path: Path) -> None:
    async with cache(url, tmp_path, memory_size=0):
        await worker.put([1, 2])
        await until_written(worker, 2)
        damage(tmp_path, SIZE // 2)
        assert await worker.get([1, 2]) == [2]
        assert await worker.has([1, 2]) == [0, 1]
        assert (await worker.stats())["disk_corrupt_total"] == 1


async def test_a_drain_writes_what_was_taken_in(url: str, worker: Worker, tmp_path: Path) -> None:
    async with cache(url, tmp_path):
        await worker.put(range(50))
    async with cache(url, tmp_path):
        assert await worker.has(range(50)) == [1] * 50


async def test_keys_that_are_no_whole_hashes_are_refused(url: str, worker: Worker) -> None:
    async with cache(url):
        with pytest.raises(DecodeError, match="16-byte"):
            await worker.bus.ask(subjects.cache("c1"), BlockHas(b"short"), BlockHasReply, timeout_s=5)


async def test_bytes_that_are_no_question_are_refused(url: str, worker: Worker) -> None:
    async with cache(url):
        with pytest.raises(WeftError, match="no "):
            # Heartbeat is a message, but none that a cache answers.
            beat = Heartbeat("worker", "w1", 1, "ready")
            await worker.bus.ask(subjects.cache("c1"), beat, BlockHasReply, timeout_s=5)


def damage(path: Path, offset: int) -> None:
    (file,) = path.glob("*/*.segment")
    damaged = bytearray(file.read_bytes())
    damaged[offset] ^= 8
    file.write_bytes(damaged)


@asynccontextmanager
async def process(url: str, path: Path, worker: Worker) -> AsyncIterator[asyncio.subprocess.Process]:
    mesh = MeshSettings(nats_url=url, instance="c1")
    environ = {**os.environ, **to_environ(CacheSettings(mesh=mesh, disk_path=str(path)))}
    running = await asyncio.create_subprocess_exec(sys.executable, "-m", "cache_svc", env=environ)
    beats: list[Heartbeat] = []
    await worker.bus.on(subjects.alive("cache", "c1"), Heartbeat, beats.append)
    try:
        await until(lambda: any(beat.state == "ready" for beat in beats), timeout_s=30)
        yield running
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()


async def test_a_killed_process_finds_its_blocks_again(url: str, worker: Worker, tmp_path: Path) -> None:
    async with process(url, tmp_path, worker) as first:
        assert await worker.put(range(20)) == [1] * 20
        await until_written(worker, 20)
        first.kill()
        await first.wait()
    async with process(url, tmp_path, worker) as second:
        assert await worker.get(range(20)) == list(range(20))
        second.terminate()
        assert await asyncio.wait_for(second.wait(), 10) == 0


async def until_written(worker: Worker, count: int) -> None:
    async with asyncio.timeout(10):
        while (await worker.stats()).get("disk_written_total") != count:
            pass
