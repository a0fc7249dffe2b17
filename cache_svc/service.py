"""The cache's shell: keeps blocks for workers, beyond any worker's memory and life.

A block put is in memory at once and on disk soon after; a block found on disk comes back into memory. Losing any of
it costs time, never correctness.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cache_svc.segments import MAX_RECORD_OVERHEAD, Block
from cache_svc.tiers import DiskTier, MemoryTier
from weft import limits, subjects
from weft.columns import pack_u32, split_hashes, unpack_u32
from weft.errors import DecodeError
from weft.messages import BlockData, BlockGet, BlockHas, BlockHasReply, BlockPut, KvEvents
from weft.service import Context
from weft.settings import CacheSettings
from weft.telemetry import totals

log = logging.getLogger(__name__)

MAX_UNWRITTEN_BYTES: Final = 64 * 2**20  # waiting for the disk
WRITE_BATCH_BYTES: Final = 4 * 2**20
# Of a BlockData; the rest of a message is room for keys and framing.
MAX_REPLY_BYTES: Final = limits.MAX_MESSAGE_BYTES - 2**20
MAX_REPLY_BLOCKS: Final = 16_384


@dataclass(slots=True)
class CacheCounters:
    """Blocks, since start."""

    asked: int = 0
    hits_memory: int = 0
    hits_disk: int = 0
    put: int = 0  # kept, that were not there before
    put_known: int = 0
    put_refused: int = 0  # no tier had room, or the service is draining
    put_corrupt: int = 0  # wrong checksum
    unwritten_dropped: int = 0  # the disk did not keep up; they are in memory only


class CacheService:
    """One shard of the cache."""

    def __init__(self, settings: CacheSettings, context: Context) -> None:
        self._context = context
        self._memory = MemoryTier(settings.memory_size)
        self._disk = DiskTier(Path(settings.disk_path).expanduser(), settings.disk_size) if settings.disk_path else None
        # Taken in, but not on disk yet; served from here as well.
        self._unwritten: dict[bytes, Block] = {}
        self._unwritten_bytes = 0
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._draining = False
        self._counters = CacheCounters()

    async def start(self) -> None:
        if self._disk is not None:
            await self._disk.start()
            self._writer = self._context.spawn(self._write_behind(self._disk), "write-behind")
        subject = subjects.cache(self._context.instance)
        await self._context.bus.answer(subject, BlockHas | BlockGet | BlockPut, self._answer)  # type: ignore[arg-type]  # a union

    async def drain(self) -> None:
        """Take no new blocks; return when all that was taken is on disk."""
        self._draining = True
        while self._unwritten:
            self._written.clear()
            await self._written.wait()

    async def stop(self) -> None:
        self._draining = True
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self._disk is not None:
            await self._disk.close()

    def models(self) -> list[str]:
        return []

    def is_live(self) -> bool:
        return True

    def stats(self) -> dict[str, float]:
        found = totals(self._counters) | {
            "memory_blocks": float(len(self._memory.table)),
            "memory_bytes": float(self._memory.table.used),
            "memory_evicted_total": float(self._memory.evicted),
            "unwritten_bytes": float(self._unwritten_bytes),
        }
        if self._disk is not None:
            found |= totals(self._disk.counters, "disk_")
            found |= {"disk_blocks": float(len(self._disk.table)), "disk_bytes": float(self._disk.table.used)}
        return found

    def snapshot(self) -> KvEvents | None:
        return None

    # ---- questions ----

    async def _answer(self, question: BlockHas | BlockGet | BlockPut) -> BlockHasReply | BlockData:
        try:
            keys = split_hashes(question.keys)
        except ValueError as error:
            raise DecodeError(str(error)) from error
        match question:
            case BlockHas():
                return BlockHasReply(bytes([self._has(key) for key in keys]))
            case BlockGet():
                return await self._get(keys, min(question.max_bytes, MAX_REPLY_BYTES))
            case BlockPut():
                return await self._put(keys, question)

    def _has(self, key: bytes) -> bool:
        return key in self._memory or key in self._unwritten or (self._disk is not None and key in self._disk)

    async def _get(self, keys: list[bytes], max_bytes: int) -> BlockData:
        self._counters.asked += len(keys)
        found = {key: block for key in keys[:MAX_REPLY_BLOCKS] if (block := self._in_memory(key)) is not None}
        on_disk = self._affordable(keys[:MAX_REPLY_BLOCKS], found, max_bytes)
        self._counters.hits_memory += len(found)
        if self._disk is not None and on_disk:
            read = await self._disk.get(on_disk)
            self._counters.hits_disk += len(read)
            for key, block in read.items():
                if key not in self._memory:
                    self._memory.put(key, block)
            found |= read
        return _block_data(keys, found, max_bytes)

    def _in_memory(self, key: bytes) -> Block | None:
        return self._memory.get(key) or self._unwritten.get(key)

    def _affordable(self, keys: list[bytes], found: dict[bytes, Block], max_bytes: int) -> list[bytes]:
        """Keys to read from disk: those before the point at which the answer is full."""
        wanted: list[bytes] = []
        room = max_bytes
        for key in keys:
            location = self._disk.table.locate(key) if self._disk is not None and key not in found else None
            if location is not None:
                wanted.append(key)
            room -= len(found[key].data) if key in found else location.length - MAX_RECORD_OVERHEAD if location else 0
            if room <= 0:
                break
        return wanted

    async def _put(self, keys: list[bytes], put: BlockPut) -> BlockHasReply:
        actual = await asyncio.to_thread(lambda: [zlib.crc32(data) for data in put.blocks])
        kept = bytearray()
        for key, data, checksum, right in zip(keys, put.blocks, unpack_u32(put.checksums), actual, strict=True):
            if checksum != right:
                self._counters.put_corrupt += 1
                kept.append(False)
            else:
                kept.append(self._keep(key, Block(data, checksum)))
        return BlockHasReply(bytes(kept))

    def _keep(self, key: bytes, block: Block) -> bool:
        """Take in a block; True if it is held now."""
        if self._has(key):
            self._counters.put_known += 1
            return True
        kept = not self._draining and any([self._memory.put(key, block), self._queue_write(key, block)])
        self._counters.put += kept
        self._counters.put_refused += not kept
        return kept

    # ---- write-behind ----

    def _queue_write(self, key: bytes, block: Block) -> bool:
        if self._disk is None or not self._disk.fits(len(block.data)):
            return False
        if self._unwritten_bytes + len(block.data) > MAX_UNWRITTEN_BYTES:
            self._counters.unwritten_dropped += 1
            return False
        self._unwritten[key] = block
        self._unwritten_bytes += len(block.data)
        self._wake.set()
        return True

    async def _write_behind(self, disk: DiskTier) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unwritten:
                batch = self._next_batch()
                await disk.put(batch)
                for key, block in batch:
                    del self._unwritten[key]
                    self._unwritten_bytes -= len(block.data)
            self._written.set()

    def _next_batch(self) -> list[tuple[bytes, Block]]:
        batch: list[tuple[bytes, Block]] = []
        size = 0
        for key, block in self._unwritten.items():
            if batch and size + len(block.data) > WRITE_BATCH_BYTES:
                break
            batch.append((key, block))
            size += len(block.data)
        return batch


def _block_data(keys: list[bytes], found: dict[bytes, Block], max_bytes: int) -> BlockData:
    """The blocks found, in the order asked, as far as they fit."""
    sent: dict[bytes, Block] = {}
    room = max_bytes
    for key in keys:
        block = found.get(key)
        if block is not None and key not in sent:
            room -= len(block.data)
            if room < 0:
                break
            sent[key] = block
    return BlockData(
        b"".join(sent),
        [block.data for block in sent.values()],
        pack_u32([block.checksum for block in sent.values()]),
    )
