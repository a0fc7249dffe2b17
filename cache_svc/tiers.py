"""The two tiers that hold blocks: memory, and behind it a folder of segment files.

The disk tier's files are touched by one thread of its own only, in the order in which it is asked; so the loop never
waits for a disk, and a segment is deleted after the last read that was begun before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from cache_svc.index import LruTable, Placement, SegmentTable
from cache_svc.segments import MAX_RECORD_OVERHEAD, Block, SegmentFolder, encode_record

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_SEGMENT_BYTES: Final = 64 * 2**20


class MemoryTier:
    """Blocks in memory under a byte budget, least recently used out first."""

    def __init__(self, budget: int) -> None:
        self.table = LruTable(budget)
        self._blocks: dict[bytes, Block] = {}
        self.evicted = 0  # blocks, since start

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def put(self, key: bytes, block: Block) -> bool:
        """Keep a block that is not there yet; False if it is larger than the budget."""
        evicted = self.table.put(key, len(block.data))
        if evicted is None:
            return False
        for old in evicted:
            del self._blocks[old]
        self.evicted += len(evicted)
        self._blocks[key] = block
        return True

    def get(self, key: bytes) -> Block | None:
        block = self._blocks.get(key)
        if block is not None:
            self.table.touch(key)
        return block


@dataclass(slots=True)
class DiskCounters:
    """Since start."""

    written: int = 0  # blocks
    refused: int = 0  # blocks larger than the budget
    corrupt: int = 0  # records that could not be read back, at start or later
    dropped_segments: int = 0
    errors: int = 0  # blocks that the disk did not take


class DiskTier:
    """Blocks in files under a byte budget; they outlive the process."""

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._budget = budget
        self.table = SegmentTable(budget, max(1, min(MAX_SEGMENT_BYTES, budget // 8)))
        self.counters = DiskCounters()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache disk")
        self._folder: SegmentFolder | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self.table

    def fits(self, size: int) -> bool:
        """Whether a block of this size could be kept."""
        return size + MAX_RECORD_OVERHEAD <= self._budget

    async def start(self) -> None:
        """Take in what an earlier life left. Raises SettingsError if the folder cannot be used."""
        folder = await self._in_thread(lambda: SegmentFolder(self._path))
        self._folder = folder
        for found in await self._in_thread(folder.scan_all):
            self.counters.corrupt += found.skipped
            self.table.adopt(found.number, found.size, found.records)
        dropped = self.table.trim()
        await self._in_thread(lambda: _write(folder, dropped, []))
        log.info("disk tier read", extra={"blocks": len(self.table), "corrupt": self.counters.corrupt})

    async def close(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            await self._in_thread(folder.close)
        self._thread.shutdown()

    async def put(self, blocks: Sequence[tuple[bytes, Block]]) -> None:
        """Write blocks that are not there yet. What the disk does not take is counted and forgotten."""
        folder = self._folder
        assert folder is not None
        placed: dict[bytes, tuple[Placement, bytes]] = {}
        for key, block in blocks:
            record = encode_record(key, block)
            placement = self.table.append(key, len(record))
            if placement is None:
                self.counters.refused += 1
            else:
                placed[key] = (placement, record)
        dropped = [number for placement, _ in placed.values() for number in placement.dropped]
        self.counters.dropped_segments += len(dropped)
        # A batch may itself push out what it began with.
        kept = [found for key, found in placed.items() if key in self.table]
        try:
            await self._in_thread(lambda: _write(folder, dropped, kept))
        except OSError as error:
            log.error("disk tier cannot write", extra={"error": str(error), "blocks": len(kept)})
            self.counters.errors += len(kept)
            self.table.forget(placed)
            self.table.close()
        else:
            self.counters.written += len(kept)

    async def get(self, keys: Sequence[bytes]) -> dict[bytes, Block]:
        """Read those of the blocks that are there. A record that is not right any more is forgotten, never served."""
        folder = self._folder
        if folder is None:
            return {}
        located = {key: location for key in keys if (location := self.table.locate(key)) is not None}
        for key in located:
            self.table.touch(key)
        read = await self._in_thread(lambda: {key: folder.read(key, place) for key, place in located.items()})
        # A segment may have been dropped after the question: its records are gone, not broken.
        broken = [key for key, block in read.items() if block is None and self.table.locate(key) == located[key]]
        self.table.forget(broken)
        self.counters.corrupt += len(broken)
        return {key: block for key, block in read.items() if block is not None}

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _write(folder: SegmentFolder, dropped: Sequence[int], records: Sequence[tuple[Placement, bytes]]) -> None:
    for number in dropped:
        folder.delete(number)
    for placement, record in records:
        folder.write(placement.location, record)
