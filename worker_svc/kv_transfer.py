"""KV blocks to and from the cache service, on a connection of its own so that bulk never delays tokens.

Nothing here is needed for correctness: what cannot be sent is dropped, what cannot be loaded is computed, and every
answer comes within a time limit.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Container, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from weft import limits, subjects
from weft.bus import Bus
from weft.columns import pack_u32, split_hashes, unpack_u32
from weft.errors import DecodeError, WeftError
from weft.messages import BlockData, BlockGet, BlockHas, BlockHash, BlockHasReply, BlockPut
from weft.telemetry import totals
from worker_svc.engine_io import BlocksLoaded, BlocksOffloaded, EngineThread, LoadWanted
from worker_svc.shards import cache_key, group_by_shard

log = logging.getLogger(__name__)

MESSAGE_BYTES: Final = 2**20  # of blocks in one message, unless one block is larger
WINDOW: Final = 4  # messages with blocks under way at once
MAX_LOADING_BYTES: Final = 512 * 2**20  # of all requests that load at the same time
PUT_TIMEOUT_S: Final = 5.0
LOAD_LIMIT_S: Final = 2.0
# Blocks of a prompt that another worker has just computed are on their way: so long after the last that came they are
# waited for, and so often asked for. In mooncake's preset the one that decodes asked 10 ms after the last step, and of
# 57 blocks of 96 KiB it found none or 10, and computed the rest in .35 s; to wait for them and load all takes .13 s
# (two cores of an AMD EPYC, 2026).
PATIENCE_S: Final = 0.1
ASK_AGAIN_S: Final = 0.005
# What a message carries besides blocks; the cache service leaves as much.
_OVERHEAD_BYTES: Final = 2**20
_RATE_WEIGHT: Final = 0.3  # of the newest measurement


@dataclass(slots=True)
class KvCounters:
    """Blocks, unless said otherwise, since start."""

    offload_offered: int = 0
    offload_sent: int = 0
    offload_already_held: int = 0
    offload_dropped: int = 0  # there was no cache service
    offload_failed: int = 0  # not answered, or refused
    loads: int = 0  # requests that asked
    load_wanted: int = 0
    load_got: int = 0
    load_bytes: int = 0
    load_failed: int = 0  # messages not answered in time, or refused
    load_corrupt: int = 0


class KvTransfer:
    """One worker's way to the cache service."""

    def __init__(
        self,
        bus: Bus,
        engine: EngineThread,
        *,
        load_limit_s: float = LOAD_LIMIT_S,
        max_loading_bytes: int = MAX_LOADING_BYTES,
        patience_s: float = 0.0,
    ) -> None:
        """`patience_s`: for blocks of requests that others have had, after the last that came."""
        self._bus = bus
        self._engine = engine
        self._load_limit_s = load_limit_s
        self._patience_s = patience_s
        self._max_loading_bytes = max_loading_bytes
        self._loading_bytes = 0
        self._shards: list[str] = []
        self._queue: list[tuple[BlockHash, bytes]] = []  # as long as the engine lets it become
        self._wake = asyncio.Event()
        # Of their own each: a put that waits for a dead shard must not use up a load's time.
        self._put_window = asyncio.Semaphore(WINDOW)
        self._get_window = asyncio.Semaphore(WINDOW)
        self._tasks: set[asyncio.Task[None]] = set()
        self._counters = KvCounters()

    async def start(self) -> None:
        await self._bus.connect()
        self._spawn(self._offload_forever())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bus.close()

    def set_shards(self, shards: Iterable[str]) -> None:
        """Say which cache instances are ready."""
        fits = 0 < self._engine.block_bytes <= limits.MAX_MESSAGE_BYTES - _OVERHEAD_BYTES
        self._shards = sorted(shards) if fits else []
        self._engine.remote_cache_available = bool(self._shards)

    def offload(self, blocks: Sequence[tuple[BlockHash, bytes]]) -> None:
        """Send blocks in the background; `engine.submit(BlocksOffloaded)` afterwards, whatever comes of it."""
        self._counters.offload_offered += len(blocks)
        self._queue.extend(blocks)
        if self._queue:
            self._wake.set()

    def load(self, wanted: LoadWanted) -> None:
        """Load blocks in the background; `engine.submit(BlocksLoaded)` within the limit, whatever comes of it."""
        self._spawn(self._load(wanted))

    @property
    def block_load_s(self) -> float:
        """Seconds that a block took lately; 0 if none was loaded yet, or there is no cache service."""
        rate = self._engine.load_bytes_per_s
        return self._engine.block_bytes / rate if rate and self._shards else 0.0

    def stats(self) -> dict[str, float]:
        return totals(self._counters) | {
            "shards": float(len(self._shards)),
            "load_bytes_per_s": self._engine.load_bytes_per_s,
        }

    # ---- offload ----

    async def _offload_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._queue = self._queue, []
            try:
                await self._put_batch(batch)
            except Exception:
                # One bad batch must not end the offload.
                log.exception("offload failed")
            finally:
                self._engine.submit(BlocksOffloaded(len(batch)))

    async def _put_batch(self, batch: list[tuple[BlockHash, bytes]]) -> None:
        if not self._shards:
            self._counters.offload_dropped += len(batch)
            return
        blocks = {cache_key(self._engine.layout, block_hash): data for block_hash, data in batch}
        groups = group_by_shard(blocks, self._shards)
        await asyncio.gather(*[self._put_to(shard, keys, blocks) for shard, keys in groups.items()])

    async def _put_to(self, shard: str, keys: list[bytes], blocks: dict[bytes, bytes]) -> None:
        try:
            held = await self._has(shard, keys, PUT_TIMEOUT_S)
        except WeftError:
            self._counters.offload_failed += len(keys)
            return
        self._counters.offload_already_held += len(held)
        missing = [key for key in keys if key not in held]
        await asyncio.gather(*[self._put(shard, piece, blocks) for piece in self._pieces(missing)])

    async def _put(self, shard: str, keys: list[bytes], blocks: dict[bytes, bytes]) -> None:
        data = [blocks[key] for key in keys]
        async with self._put_window:
            checksums = await asyncio.to_thread(_checksums, data)
            message = BlockPut(b"".join(keys), data, pack_u32(checksums))
            try:
                reply = await self._bus.ask(subjects.cache(shard), message, BlockHasReply, timeout_s=PUT_TIMEOUT_S)
            except WeftError:
                self._counters.offload_failed += len(keys)
                return
        kept = min(sum(map(bool, reply.held)), len(keys))
        self._counters.offload_sent += kept
        self._counters.offload_failed += len(keys) - kept

    # ---- load ----

    async def _load(self, wanted: LoadWanted) -> None:
        blocks: list[bytes] = []
        try:
            blocks = await self._fetch(wanted.hashes, self._patience_s if wanted.epoch else 0.0)
        except Exception:
            # The request waits for an answer.
            log.exception("load failed", extra={"request_id": wanted.request_id})
        self._engine.submit(BlocksLoaded(wanted.request_id, wanted.epoch, wanted.hashes[: len(blocks)], tuple(blocks)))

    async def _fetch(self, hashes: Sequence[BlockHash], patience_s: float) -> list[bytes]:
        """The longest unbroken run of blocks, from the first on, that could be had in time."""
        deadline = asyncio.get_running_loop().time() + self._load_limit_s
        self._counters.loads += 1
        self._counters.load_wanted += len(hashes)
        keys = [cache_key(self._engine.layout, block_hash) for block_hash in hashes]
        shards = self._shards
        if not shards:
            return []
        keys = await self._held(keys, shards, deadline, patience_s)
        # What there is no memory for is computed.
        keys = keys[: (self._max_loading_bytes - self._loading_bytes) // self._engine.block_bytes]
        self._loading_bytes += len(keys) * self._engine.block_bytes
        try:
            found = await self._get_all(keys, shards, deadline)
        finally:
            self._loading_bytes -= len(keys) * self._engine.block_bytes
        got = _unbroken(keys, found)
        self._counters.load_got += len(got)
        return [found[key] for key in got]

    async def _held(self, keys: list[bytes], shards: list[str], deadline: float, patience_s: float) -> list[bytes]:
        """Those of the keys that are held, from the first on, when all are or no more have come for so long."""
        time = asyncio.get_running_loop().time
        held, came_at = 0, time()
        while True:
            answers = [self._held_by(shard, own, deadline) for shard, own in group_by_shard(keys, shards).items()]
            run = _unbroken(keys, set[bytes]().union(*await asyncio.gather(*answers)))
            now = time()
            if len(run) > held:
                held, came_at = len(run), now
            if len(run) == len(keys) or now + ASK_AGAIN_S >= min(came_at + patience_s, deadline):
                return run
            await asyncio.sleep(ASK_AGAIN_S)

    async def _get_all(self, keys: list[bytes], shards: list[str], deadline: float) -> dict[bytes, bytes]:
        pieces = [(shard, piece) for shard, own in group_by_shard(keys, shards).items() for piece in self._pieces(own)]
        # What stands first in the prompt is asked for first, in case the time does not suffice.
        position = {key: i for i, key in enumerate(keys)}
        pieces.sort(key=lambda pair: position[pair[1][0]])
        found: dict[bytes, bytes] = {}
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*[self._get(shard, piece, found, deadline) for shard, piece in pieces])
        self._measure(sum(map(len, found.values())), asyncio.get_running_loop().time() - began)
        return found

    async def _held_by(self, shard: str, keys: list[bytes], deadline: float) -> set[bytes]:
        try:
            return await self._has(shard, keys, _remaining(deadline))
        except WeftError:
            self._counters.load_failed += 1
            return set()

    async def _get(self, shard: str, keys: list[bytes], found: dict[bytes, bytes], deadline: float) -> None:
        """Ask for blocks and put those that are whole into `found`."""
        size, asked = self._engine.block_bytes, set(keys)
        async with self._get_window:
            message = BlockGet(b"".join(keys), len(keys) * size)
            try:
                reply = await self._bus.ask(subjects.cache(shard), message, BlockData, timeout_s=_remaining(deadline))
            except WeftError:
                self._counters.load_failed += 1
                return
            checksums = await asyncio.to_thread(_checksums, reply.blocks)
        expected = unpack_u32(reply.checksums)
        for key, data, checksum, right in zip(split_hashes(reply.keys), reply.blocks, checksums, expected, strict=True):
            if checksum == right and len(data) == size and key in asked:
                found[key] = data
            else:
                self._counters.load_corrupt += 1

    def _measure(self, size: int, seconds: float) -> None:
        self._counters.load_bytes += size
        if size:
            rate, before = size / max(seconds, 1e-6), self._engine.load_bytes_per_s
            self._engine.load_bytes_per_s = before + _RATE_WEIGHT * (rate - before) if before else rate

    # ---- both ----

    async def _has(self, shard: str, keys: list[bytes], timeout_s: float) -> set[bytes]:
        """Which of the keys the shard holds. Raises WeftError if it does not say."""
        reply = await self._bus.ask(subjects.cache(shard), BlockHas(b"".join(keys)), BlockHasReply, timeout_s=timeout_s)
        if len(reply.held) != len(keys):
            raise DecodeError(f"{shard} was asked for {len(keys)} keys and answered for {len(reply.held)}")
        return {key for key, held in zip(keys, reply.held, strict=True) if held}

    def _pieces(self, keys: list[bytes]) -> list[list[bytes]]:
        """Cut keys so that the blocks of each piece fit into one message."""
        width = max(1, MESSAGE_BYTES // self._engine.block_bytes)
        return [keys[i : i + width] for i in range(0, len(keys), width)]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _unbroken(keys: list[bytes], found: Container[bytes]) -> list[bytes]:
    """The keys before the first that is not in `found`."""
    return list(takewhile(lambda key: key in found, keys))


def _checksums(blocks: Iterable[bytes]) -> list[int]:
    return [zlib.crc32(block) for block in blocks]


def _remaining(deadline: float) -> float:
    return max(0.001, deadline - asyncio.get_running_loop().time())
