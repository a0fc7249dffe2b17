"""KV memory that all workers share: which blocks it holds, and how long they take to get there and back.

The store is the least recently used cache of Mooncake (FAST '25, section 4): one pool over the memory of all nodes,
of so many tokens. A worker's link carries one transfer at a time in each direction, so those of one worker wait for
each other; what is between the links is never the bottleneck. A worker asks by the shipping rule
(`worker_svc.kv_exchange`); this says what it gets, and when.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weft.messages import BlockHash


@dataclass(frozen=True, slots=True)
class KvSharing:
    """How KV is shared."""

    bytes_per_token: int
    capacity_tokens: int | None = (
        None  # of the store; None: no bound; 0: blocks come only from who had a request before
    )
    bytes_per_s: float = 12.5e9  # of each worker's link, in each direction
    latency_s: float = 0.001  # from asking to the first byte

    def block_s(self, block_size: int) -> float:
        """Seconds that a block takes on a link that carries nothing else."""
        return block_size * self.bytes_per_token / self.bytes_per_s


class KvPool:
    """The store, and the links of the workers."""

    def __init__(self, sharing: KvSharing, block_size: int) -> None:
        self.sharing = sharing
        self.block_s = sharing.block_s(block_size)
        tokens = sharing.capacity_tokens
        self._capacity = None if tokens is None else tokens // block_size
        self._held: OrderedDict[BlockHash, None] = OrderedDict()  # least recently used first
        self._coming: set[BlockHash] = set()
        self._in_free_at: dict[str, float] = {}
        self._out_free_at: dict[str, float] = {}
        self.num_fetched_blocks = 0
        self.num_stored_blocks = 0

    @property
    def num_blocks(self) -> int:
        return len(self._held)

    def use(self, hashes: Iterable[BlockHash]) -> int:
        """How many of the first blocks the store holds; these were just used. Mutates self."""
        count = 0
        for block_hash in hashes:
            if block_hash not in self._held:
                break
            self._held.move_to_end(block_hash)
            count += 1
        return count

    def fetch(self, worker: str, count: int, now: float, source: str | None = None) -> float:
        """Book blocks on a worker's link, and on that of the worker that sends them; returns when they are there."""
        begins = max(now + self.sharing.latency_s, self._in_free_at.get(worker, 0.0))
        if source is not None:
            begins = max(begins, self._out_free_at.get(source, 0.0))
        ends = begins + count * self.block_s
        self._in_free_at[worker] = ends
        if source is not None:
            self._out_free_at[source] = ends
        self.num_fetched_blocks += count
        return ends

    def send(self, worker: str, hashes: Sequence[BlockHash], now: float) -> tuple[list[BlockHash], float]:
        """Book what the store lacks of a worker's new blocks; returns these, and when they are there. Mutates self."""
        fresh = [block for block in hashes if block not in self._held and block not in self._coming]
        if self._capacity == 0 or not fresh:
            return [], now
        self._coming.update(fresh)
        begins = max(now + self.sharing.latency_s, self._out_free_at.get(worker, 0.0))
        ends = self._out_free_at[worker] = begins + len(fresh) * self.block_s
        return fresh, ends

    def put(self, hashes: Iterable[BlockHash]) -> None:
        """Blocks that were sent have come. Mutates self."""
        for block_hash in hashes:
            self._coming.discard(block_hash)
            self._held[block_hash] = None
            self.num_stored_blocks += 1
            if self._capacity is not None and len(self._held) > self._capacity:
                self._held.popitem(last=False)
