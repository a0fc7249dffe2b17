"""Which tokens a draft model has computed, in the blocks that the target's sequences have. Pure.

Both models have a KV cache of as many blocks, and a token has the same slot in both. So the target's books are the
draft model's as well, but for what it has computed: less, as it is not asked in every step. A block that is shared by
its hash is known here by the same hash, once the draft model has computed all of it.
"""

from __future__ import annotations

from weft.hashing import BLOCK_SIZE
from weft.messages import BlockHash
from worker_svc.sequence import Sequence


class DraftBook:
    """Tokens that the draft model need not compute again."""

    def __init__(self) -> None:
        self._num_computed: dict[Sequence, int] = {}
        self._whole: dict[int, BlockHash] = {}  # by block id: what the draft model has computed all of there

    def num_computed(self, sequence: Sequence) -> int:
        """Tokens of the sequence, from the first on, that need not be computed; not more than are known but one.

        Mutates: looks for shared blocks when a sequence is new.
        """
        count = self._num_computed.get(sequence)
        if count is None:
            count = self._num_computed[sequence] = self._count_shared(sequence)
        return min(count, sequence.num_known_tokens - 1)

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        """The tokens of [start, end) were computed."""
        self._num_computed[sequence] = end
        for i in range(start // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
            block_id = sequence.block_table[i]
            is_whole = (i + 1) * BLOCK_SIZE <= min(end, sequence.num_known_tokens)
            if is_whole and i < len(sequence.hashes):
                self._whole[block_id] = sequence.hashes[i]
            else:
                self._whole.pop(block_id, None)

    def keep(self, sequence: Sequence, end: int) -> None:
        """Of what was computed, only tokens before `end` are the sequence's."""
        count = self._num_computed.get(sequence)
        if count is not None:
            self._num_computed[sequence] = min(count, end)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended, or given its blocks back."""
        self._num_computed.pop(sequence, None)

    def _count_shared(self, sequence: Sequence) -> int:
        count = 0
        for block_id, block_hash in zip(sequence.block_table, sequence.hashes, strict=False):
            if self._whole.get(block_id) != block_hash:
                break
            count += BLOCK_SIZE
        return count
