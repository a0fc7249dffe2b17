"""Which blocks a worker asks of the cache service, and which it gives. Pure: the engine moves the bytes.

A new sequence whose first blocks are not here may wait for them (state LOADING) if loading is thought to be faster
than computing; others that lack the same block wait with it. Full blocks are offered once each, a few a step.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from weft.hashing import BLOCK_SIZE
from weft.messages import BlockHash
from weft.settings import WorkerSettings
from worker_svc.blocks import BlockPool
from worker_svc.engine_io import BlocksLoaded, LoadWanted
from worker_svc.sequence import Sequence, State

# Asking costs messages and a wait; this little is computed sooner.
MIN_AUTO_TOKENS: Final = 4 * BLOCK_SIZE
LOAD_LATENCY_S: Final = 0.005
# Answers in a row that brought nothing, after which only each eighth new prompt is asked for: an answer is heard when
# the step is over that a worker is in, so each such prompt waits for 20 to 200 ms on a busy CPU.
REST_AFTER: Final = 16
ASK_EVERY: Final = 8
# Reading a block costs the step that it is read in.
MAX_OFFLOADS_PER_STEP: Final = 8
# Enough to keep the connection busy, and soon sent when a request ends the idle time in which a CPU sends.
MAX_OFFLOADING_BYTES: Final = 8 * 2**20
MAX_OFFLOADS_QUEUED: Final = 8192
MAX_OFFERED: Final = 262_144


@dataclass(slots=True)
class _Load:
    first: BlockHash
    wanted: frozenset[BlockHash]
    sequences: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Placed:
    """What came of a load: where the bytes of each block are to be written, before anything is computed."""

    block_ids: list[int]
    blocks: list[bytes]
    sequences: list[Sequence]  # that waited, and now wait for admission


class KvExchange:
    """The books of what was asked and offered.

    `is_available`, `load_bytes_per_s` and `prefill_tokens_per_s` are told from outside; a rate of 0 is not known yet.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        kv_load: str,
        kv_offload: str,
        block_bytes: int,
        max_offloads_per_step: int = MAX_OFFLOADS_PER_STEP,
    ) -> None:
        """`kv_load`, `kv_offload`: as the settings say, but `kv_offload` is not "auto"."""
        self.is_available = False
        self.load_bytes_per_s = 0.0
        self.prefill_tokens_per_s = 0.0
        self._pool = pool
        self._kv_load = kv_load
        self._kv_offload = kv_offload
        self._block_bytes = block_bytes
        self._max_offloads_per_step = max_offloads_per_step
        self._num_offloading = 0
        self._max_offloading = max(1, MAX_OFFLOADING_BYTES // max(1, block_bytes))
        self._num_fruitless = 0  # answers in a row, and prompts since that were not asked for
        self._loads: dict[tuple[str, int], _Load] = {}
        self._load_of: dict[BlockHash, _Load] = {}  # by the first block that is asked for
        self._queue: OrderedDict[BlockHash, None] = OrderedDict()
        self._offered: OrderedDict[BlockHash, None] = OrderedDict()  # oldest first

    @property
    def num_loading(self) -> int:
        return sum(len(load.sequences) for load in self._loads.values())

    @property
    def has_offloads(self) -> bool:
        """Whether blocks could be read and sent now."""
        return bool(self._queue) and self._num_offloading < self._max_offloading

    def set_available(self, is_available: bool) -> None:
        """A cache service that comes (back) may hold nothing: offer everything anew from then on."""
        if is_available and not self.is_available:
            self._offered.clear()
            self._num_fruitless = 0
        self.is_available = is_available

    def park(self, sequence: Sequence) -> tuple[bool, LoadWanted | None]:
        """Decide whether a new sequence waits for blocks, and whether these are to be asked for.

        Mutates: the sequence's state, if it waits.
        """
        if not self.is_available or self._kv_load == "never":
            return False, None
        hashes = sequence.extend_hashes()
        missing = hashes[len(self._pool.lookup(hashes)) :]
        if not missing:
            return False, None
        load, wanted = self._load_of.get(missing[0]), None
        if load is None:
            request = sequence.request
            if not self._is_worth_it(len(missing), is_recovered=request.epoch > 0):
                return False, None
            wanted = LoadWanted(request.request_id, request.epoch, tuple(missing))
            load = self._load_of[missing[0]] = _Load(missing[0], frozenset(missing))
            self._loads[request.request_id, request.epoch] = load
        load.sequences.append(sequence)
        sequence.state = State.LOADING
        return True, wanted

    def _is_worth_it(self, num_blocks: int, *, is_recovered: bool) -> bool:
        """`is_recovered`: another worker has computed the sequence before, and may have left its blocks there."""
        if self._kv_load == "always":
            return True
        num_tokens = num_blocks * self._pool.block_size
        if num_tokens < MIN_AUTO_TOKENS:
            return False
        if self._num_fruitless >= REST_AFTER and not is_recovered:
            self._num_fruitless += 1
            if self._num_fruitless % ASK_EVERY:
                return False
        if not self.load_bytes_per_s or not self.prefill_tokens_per_s:
            return True
        load_s = LOAD_LATENCY_S + num_blocks * self._block_bytes / self.load_bytes_per_s
        return load_s < num_tokens / self.prefill_tokens_per_s

    def forget(self, sequence: Sequence) -> None:
        """A sequence that was dropped while it waited. Others may still wait for what it asked for."""
        for load in self._loads.values():
            if sequence in load.sequences:
                load.sequences.remove(sequence)

    def place(self, loaded: BlocksLoaded, waiting: list[Sequence]) -> Placed:
        """Put blocks that came into the prefix cache, held by nobody, and let those that waited for them go on.

        Mutates: the pool; `waiting`, where they come to their places by arrival; and their states.
        """
        blocks, sequences = self._take(loaded)
        # What is here of the prefix already must not be evicted to make room for the rest of it.
        held = self._pool.lookup(sequences[0].hashes) if sequences else []
        self._pool.touch(held)
        blocks = blocks[: self._pool.num_free_blocks]
        block_ids = self._pool.allocate(len(blocks))
        for block_id, (block_hash, _) in zip(block_ids, blocks, strict=True):
            self._pool.commit(block_id, block_hash)
        self._pool.free(held + block_ids)
        for sequence in sequences:
            sequence.state = State.WAITING
            insort(waiting, sequence, key=lambda one: one.arrival)
        return Placed(block_ids, [block for _, block in blocks], sequences)

    def _take(self, loaded: BlocksLoaded) -> tuple[list[tuple[BlockHash, bytes]], list[Sequence]]:
        """What came of a load: the blocks that are asked for and still not here, and who waited for them.

        The caller sets the state of these sequences.
        """
        load = self._loads.pop((loaded.request_id, loaded.epoch), None)
        if load is None:
            return [], []
        del self._load_of[load.first]
        self._num_fruitless = 0 if loaded.blocks else self._num_fruitless + 1
        blocks: list[tuple[BlockHash, bytes]] = []
        for block_hash, block in zip(loaded.hashes, loaded.blocks, strict=False):
            if block_hash not in load.wanted or len(block) != self._block_bytes:
                break
            self._remember(block_hash)
            if self._pool.block_of(block_hash) is None:
                blocks.append((block_hash, block))
        return blocks, load.sequences

    def offer(self, block_hash: BlockHash) -> None:
        """A block has been filled: queue it for the cache service, unless it was offered before."""
        if not self.is_available or self._kv_offload == "never" or block_hash in self._offered:
            return
        if len(self._queue) < MAX_OFFLOADS_QUEUED:
            self._queue[block_hash] = None
            self._remember(block_hash)

    def next_offloads(self, is_idle: bool) -> list[tuple[BlockHash, int]]:
        """The next few (hash, block id) to read, without those that were evicted meanwhile.

        A CPU that computes reads and sends blocks at the cost of its steps: with blocks sent at once, 16 streams of a
        125M-parameter model got 147 tokens/s where they get 227 (two cores of an AMD EPYC, 2026).
        """
        found: list[tuple[BlockHash, int]] = []
        if self._kv_offload == "idle" and not is_idle:
            return found
        most = min(self._max_offloads_per_step, self._max_offloading - self._num_offloading)
        while self._queue and len(found) < most:
            block_hash, _ = self._queue.popitem(last=False)
            block_id = self._pool.block_of(block_hash)
            if block_id is not None:
                found.append((block_hash, block_id))
        self._num_offloading += len(found)
        return found

    def offloaded(self, num_blocks: int) -> None:
        """So many of `next_offloads` are under way no more."""
        self._num_offloading -= num_blocks

    def _remember(self, block_hash: BlockHash) -> None:
        self._offered[block_hash] = None
        if len(self._offered) > MAX_OFFERED:
            self._offered.popitem(last=False)


def make_exchange(pool: BlockPool, settings: WorkerSettings, *, block_bytes: int, is_cpu: bool) -> KvExchange:
    """As a worker with these settings has it; `is_cpu`: it computes on one.

    Who prefills for others has no use for its blocks but that these find them: it sends all that a step fills.
    """
    is_prefill = settings.role == "prefill"
    when, per_step = settings.kv_offload, MAX_OFFLOADS_PER_STEP
    if when == "auto":
        when = "idle" if is_cpu and not is_prefill else "always"
    if is_prefill:
        per_step = max(per_step, pool.blocks_for(settings.max_num_batched_tokens) + 1)
    return KvExchange(
        pool,
        kv_load=settings.kv_load,
        kv_offload=when,
        block_bytes=block_bytes,
        max_offloads_per_step=per_step,
    )
