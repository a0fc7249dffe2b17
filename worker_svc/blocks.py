"""The KV blocks of a worker: who holds which, and which still hold content that another sequence may reuse.

Every block is in exactly one of three states, and their numbers add up to the total:

    free     no content worth keeping
    cached   held by nobody, but full and known by its hash: a prefix hit, or evicted when blocks run out
    held     in the block tables of `ref_count` sequences

Content is reused by hash (`weft.hashing`), least recently used goes first, and a sequence's last blocks before its
first: a prefix without its tail is a prefix, a tail without its prefix is nothing.
Idea of the hash-indexed pool: vLLM, docs/design/prefix_caching.md.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from weft.errors import InvariantViolation
from weft.hashing import BLOCK_SIZE
from weft.messages import BlockHash


class BlockPool:
    """Books of `num_blocks` blocks; the bytes themselves are the runner's."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        """`block_size`: tokens of a block; another one only where nothing is computed, as in a simulator."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        # One byte a block, 1 if it is free: `find` looks for free blocks in a row among a thousand in a microsecond.
        self._free = bytearray(b"\1" * num_blocks)
        self._num_free = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        # Net changes of `_block_of` since `take_changes`; dicts for their order.
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give: free or only cached."""
        return self._num_free + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def block_of(self, block_hash: BlockHash) -> int | None:
        """The block known by this hash."""
        return self._block_of.get(block_hash)

    def hashes(self) -> list[BlockHash]:
        """All hashes known; safe to call from any thread, since copying a dict's keys is one operation."""
        return list(self._block_of)

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest known prefix of a hash chain; they stay as they are until `touch`."""
        blocks: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """How many of these nobody holds, so that `touch` would take them out of `num_free_blocks`."""
        return sum(not self._ref_counts[block_id] for block_id in block_ids)

    def touch(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that `lookup` found: one reference more each."""
        for block_id in block_ids:
            if not self._ref_counts[block_id]:
                self._cached.pop(block_id)
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks of undefined content, evicting cached ones if need be.

        They come in ascending order and in as few runs as can be had: free ones in a row if there are so many, while
        cached ones that are evicted together were mostly freed together.

        Raises:
            InvariantViolation: there are fewer than `count`; callers look at `num_free_blocks` first.
        """
        if count > self.num_free_blocks:
            raise InvariantViolation(f"{count} blocks wanted, {self.num_free_blocks} are free")
        blocks = self._take_free(count)
        blocks += [self._evict() for _ in range(count - len(blocks))]
        for block_id in blocks:
            self._ref_counts[block_id] = 1
        return sorted(blocks)

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one reference to each block of a table, the last block first.

        Raises:
            InvariantViolation: nobody holds one of them.
        """
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise InvariantViolation(f"block {block_id} is freed but nobody holds it")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            if self._hash_of[block_id] is None:
                self._free[block_id] = 1
                self._num_free += 1
            else:
                self._cached[block_id] = None

    def commit(self, block_id: int, block_hash: BlockHash) -> None:
        """Say that a held block is full and what it holds.

        If another block is known by this hash already, both are kept, and this one stays unknown: it is free as soon
        as its holder lets go.

        Raises:
            InvariantViolation: nobody holds the block, or it holds something else already.
        """
        if not self._ref_counts[block_id] or self._hash_of[block_id] not in (None, block_hash):
            raise InvariantViolation(f"block {block_id} is committed but not held, or twice")
        if block_hash in self._block_of:
            return
        self._hash_of[block_id] = block_hash
        self._block_of[block_hash] = block_id
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = None

    def disown(self, block_ids: Iterable[int]) -> None:
        """Take the hashes of held blocks away: what they hold is not to be trusted, nor found by anybody again."""
        for block_id in block_ids:
            self._unname(block_id)

    def copy_on_write(self, block_id: int) -> int:
        """Exchange one reference to a block for a block of one's own; the caller copies the bytes.

        Raises:
            InvariantViolation: no block is free.
        """
        target = self.allocate(1)[0]
        self.free((block_id,))
        return target

    def take_changes(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Hashes (stored, removed) since the last call, without those that came and went in between."""
        changes = tuple(self._stored), tuple(self._removed)
        if self._stored or self._removed:
            self._stored, self._removed = {}, {}
        return changes

    def _take_free(self, count: int) -> list[int]:
        """Up to `count` free blocks, the first rows of them that are long enough."""
        taken: list[int] = []
        size = min(count, self._num_free)
        while size:
            start = self._free.find(b"\1" * size)
            if start < 0:
                size //= 2
                continue
            self._free[start : start + size] = bytes(size)
            self._num_free -= size
            taken += range(start, start + size)
            size = min(count - len(taken), size, self._num_free)
        return taken

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._unname(block_id)
        return block_id

    def _unname(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is None:
            return
        self._hash_of[block_id] = None
        del self._block_of[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def check(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Prove that the books balance; with all block tables there are, also that every reference is theirs.

        Raises:
            InvariantViolation: says what does not add up.
        """
        held = sum(count > 0 for count in self._ref_counts)
        free = [block_id for block_id, is_free in enumerate(self._free) if is_free]
        if self._num_free + len(self._cached) + held != self.num_blocks or len(free) != self._num_free:
            raise InvariantViolation(
                f"{self._num_free} free + {len(self._cached)} cached + {held} held blocks are not {self.num_blocks}"
            )
        if any(block_id in self._cached or self._ref_counts[block_id] for block_id in free):
            raise InvariantViolation("a block is free while it is cached or held")
        if any(self._ref_counts[block_id] for block_id in self._cached):
            raise InvariantViolation("a block is cached while it is held")
        known = {block_id: block_hash for block_id, block_hash in enumerate(self._hash_of) if block_hash is not None}
        if {block_hash: block_id for block_id, block_hash in known.items()} != self._block_of:
            raise InvariantViolation("hashes and blocks do not name each other")
        if any(block_id in known for block_id in free) or any(block_id not in known for block_id in self._cached):
            raise InvariantViolation("a free block has a hash, or a cached one has none")
        if tables is not None:
            references = Counter(block_id for table in tables for block_id in table)
            for block_id, count in enumerate(self._ref_counts):
                if references[block_id] != count:
                    raise InvariantViolation(
                        f"block {block_id} counts {count} references, the block tables hold {references[block_id]}"
                    )
