"""The tiers on a real disk: budgets kept, blocks found again after a restart, damage never served."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cache_svc.segments import Block
from cache_svc.tiers import DiskTier, MemoryTier


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def block(number: int, size: int = 1000) -> Block:
    data = number.to_bytes(4, "big") * (size // 4)
    return Block(data, zlib.crc32(data))


def numbered(*numbers: int) -> list[tuple[bytes, Block]]:
    return [(key(number), block(number)) for number in numbers]


@asynccontextmanager
async def disk_tier(path: Path, budget: int = 100_000) -> AsyncIterator[DiskTier]:
    tier = DiskTier(path, budget)
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.segment"))


def test_the_memory_tier_serves_what_it_keeps_and_evicts_the_least_recently_used() -> None:
    tier = MemoryTier(3000)
    for number in (0, 1, 2):
        assert tier.put(key(number), block(number))
    assert tier.get(key(0)) == block(0)
    assert tier.put(key(3), block(3))
    assert [key(number) in tier for number in range(4)] == [True, False, True, True]
    assert tier.get(key(1)) is None
    assert not tier.put(key(4), block(4, 4000))
    assert (tier.evicted, tier.table.used) == (1, 3000)


async def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.put(numbered(0, 1, 2))
        assert await tier.get([key(2), key(0), key(9)]) == dict(numbered(2, 0))
        assert tier.counters.written == 3


async def test_blocks_outlive_the_tier(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.put(numbered(0, 1))
    async with disk_tier(tmp_path) as tier:
        assert await tier.get([key(0), key(1)]) == dict(numbered(0, 1))
        await tier.put(numbered(2))
    async with disk_tier(tmp_path) as tier:
        assert await tier.get([key(i) for i in range(3)]) == dict(numbered(0, 1, 2))


async def test_files_stay_within_the_budget_and_the_newest_blocks_are_kept(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, 20_000) as tier:
        for start in range(0, 100, 7):
            await tier.put(numbered(*range(start, start + 7)))
            tier.table.check()
            assert sum(file.stat().st_size for file in files(tmp_path)) == tier.table.used <= 20_000
        assert await tier.get([key(104)]) == dict(numbered(104))
        assert key(0) not in tier
        assert tier.counters.dropped_segments > 0


async def test_a_smaller_budget_at_restart_is_kept(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, 100_000) as tier:
        await tier.put(numbered(*range(50)))
    async with disk_tier(tmp_path, 20_000) as tier:
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 20_000
        assert key(49) in tier and key(0) not in tier


async def test_one_batch_larger_than_the_budget_leaves_what_fits(tmp_path: Path) -> None:
    async with disk_tier(tmp_path, 10_000) as tier:
        await tier.put(numbered(*range(40)))
        tier.table.check()
        kept = [key(number) for number in range(40) if key(number) in tier]
        assert kept and len(await tier.get(kept)) == len(kept)
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 10_000


async def test_a_bit_that_flips_on_disk_is_found_and_never_served(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.put(numbered(0, 1, 2))
        (file,) = files(tmp_path)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert await tier.get([key(0), key(1), key(2)]) == dict(numbered(0, 2))
        assert key(1) not in tier
        assert tier.counters.corrupt == 1
        await tier.put(numbered(1))
        assert await tier.get([key(1)]) == dict(numbered(1))


async def test_damage_found_at_start_is_counted(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        await tier.put(numbered(0, 1, 2))
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    async with disk_tier(tmp_path) as tier:
        assert tier.counters.corrupt == 1
        assert await tier.get([key(0), key(1), key(2)]) == dict(numbered(0, 1))


async def test_a_disk_that_takes_nothing_costs_only_its_blocks(tmp_path: Path) -> None:
    async with disk_tier(tmp_path) as tier:
        shutil.rmtree(tmp_path / "shard-0")
        await tier.put(numbered(0, 1))
        assert tier.counters.errors == 2
        assert key(0) not in tier and await tier.get([key(0)]) == {}
        (tmp_path / "shard-0").mkdir()
        await tier.put(numbered(2))
        assert await tier.get([key(2)]) == dict(numbered(2))
        tier.table.check()
