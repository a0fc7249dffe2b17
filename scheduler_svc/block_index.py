"""Which worker holds which KV blocks, learnt from numbered events. Pure.

An inverted index: block hash → bit mask of workers. A request's chain is walked from its first block, keeping the
workers that hold every block so far, until none is left: the cost is that of the longest match, whatever the number
of workers. A holder whose events have a gap is asked for a snapshot; until it comes, later events are kept aside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from weft.columns import split_hashes
from weft.hashing import HASH_BYTES
from weft.messages import KvEvents

# Events kept aside while a snapshot is on its way; past that, another snapshot is needed anyway.
MAX_ASIDE: Final = 1024
# Of a prompt's hashes, those that are looked up at once.
PIECE_BYTES: Final = 32 * HASH_BYTES
# After so long without an answer, or without the events that a status speaks of, ask (again).
SNAPSHOT_WAIT_S: Final = 2.0


@dataclass(slots=True)
class _Holder:
    bit: int
    epoch: int
    sequence: int | None = None  # of the last event applied; None: a snapshot is needed
    blocks: set[bytes] = field(default_factory=set)
    aside: list[KvEvents] = field(default_factory=list)
    asked_at: float | None = None
    behind_since: float | None = None


class Match(msgspec.Struct, frozen=True):
    """How much of a prompt each worker holds: (number of leading blocks, mask of workers that hold so many or more).

    Shallow to deep; a worker in no mask holds not even the first block.
    """

    levels: tuple[tuple[int, int], ...] = ()

    @property
    def longest(self) -> int:
        return self.levels[-1][0] if self.levels else 0

    @property
    def holders(self) -> int:
        """Mask of those with the longest match."""
        return self.levels[-1][1] if self.levels else 0

    def within(self, mask: int) -> Match:
        """The same for some of the workers."""
        if not self.levels or not self.levels[0][1] & ~mask:
            return self
        return Match(tuple((depth, held & mask) for depth, held in self.levels if held & mask))

    def depth(self, bit: int) -> int:
        """How many leading blocks one worker holds."""
        return self.depths((bit,))[0]

    def depths(self, bits: Iterable[int]) -> list[int]:
        """How many leading blocks each of some workers holds."""
        levels, found = self.levels, []
        if not levels:
            return [0 for _ in bits]
        last, (_, any_of_it), (longest, all_of_it) = len(levels) - 1, levels[0], levels[-1]
        for bit in bits:
            if all_of_it >> bit & 1:
                found.append(longest)
                continue
            if not any_of_it >> bit & 1:
                found.append(0)
                continue
            # Who holds much holds less as well. Most are in the first few levels only.
            inside, outside = 0, 1
            while levels[outside][1] >> bit & 1:
                inside, outside = outside, min(2 * outside, last)
            while outside - inside > 1:
                middle = (inside + outside) // 2
                if levels[middle][1] >> bit & 1:
                    inside = middle
                else:
                    outside = middle
            found.append(levels[inside][0])
        return found

    def groups(self, candidates: int) -> Iterator[tuple[int, int]]:
        """(number of leading blocks, mask of the candidates that hold so many and no more), deep to shallow."""
        deeper = 0
        for depth, mask in (*reversed(self.levels), (0, candidates)):
            if fresh := mask & ~deeper:
                yield depth, fresh
            deeper |= mask


NO_MATCH: Final = Match()


class BlockIndex:
    """Blocks by holder and holders by block."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}
        self._masks: dict[bytes, int] = {}
        self._free_bits: list[int] = []

    @property
    def num_blocks(self) -> int:
        return len(self._masks)

    def add(self, holder: str, epoch: int) -> int:
        """A new life of a holder, of which nothing is known; returns its bit. The life before must be removed."""
        bit = self._free_bits.pop() if self._free_bits else len(self._holders)
        self._holders[holder] = _Holder(bit, epoch)
        return bit

    def remove(self, holder: str) -> None:
        """Forget a holder and its blocks."""
        found = self._holders.pop(holder)
        self._discard(found, frozenset(found.blocks))
        self._free_bits.append(found.bit)

    def apply(self, events: KvEvents, now: float) -> bool:
        """Take in one message; True if a snapshot is wanted (once for each gap).

        Raises ValueError, with nothing changed, if its columns are broken.
        """
        holder = self._holders.get(events.holder)
        if holder is None or holder.epoch != events.epoch:
            return False
        if events.snapshot:
            if holder.sequence is not None and events.sequence < holder.sequence:
                return False
            self._replace(holder, events)
            return self._catch_up(holder, now)
        if holder.sequence is None:
            self._put_aside(holder, events)
            return self._want(holder, now)
        if events.sequence > holder.sequence + 1:
            self._put_aside(holder, events)
            holder.sequence = None
            return self._want(holder, now)
        if events.sequence == holder.sequence + 1:
            self._step(holder, events)
        return False

    def check_sequence(self, holder: str, sequence: int, now: float) -> bool:
        """What a status says of the last event sent; True if a snapshot is wanted.

        Statuses and events come on different subscriptions and overtake each other, so only an event that stays
        away counts as missed.
        """
        found = self._holders[holder]
        if found.sequence is None:
            if sequence == 0 and not found.aside:
                found.sequence = 0
                return False
            return self._want(found, now)
        if sequence <= found.sequence:
            found.behind_since = None
            return False
        if found.behind_since is None:
            found.behind_since = now
        if now - found.behind_since <= SNAPSHOT_WAIT_S:
            return False
        found.sequence = None
        return self._want(found, now)

    def match(self, hashes: bytes, candidates: int) -> Match:
        """How many leading blocks of a column of hashes each of the candidates (a mask of bits) holds."""
        holders = self._masks.get
        levels: list[tuple[int, int]] = []
        alive, depth = candidates, 0
        before: int | None = -1
        # Cut piece by piece: most of a long prompt is known to nobody.
        for start in range(0, len(hashes), PIECE_BYTES):
            for mask in map(holders, split_hashes(hashes[start : start + PIECE_BYTES])):
                # Most blocks are held by those that hold the one before, and by the same object.
                if mask is not before:
                    still = 0 if mask is None else alive & mask
                    if still != alive:
                        if depth:
                            levels.append((depth, alive))
                        if not still:
                            return Match(tuple(levels))
                        alive = still
                    before = mask
                depth += 1
        return Match((*levels, (depth, alive))) if depth else NO_MATCH

    def blocks_of(self, holder: str) -> frozenset[bytes]:
        return frozenset(self._holders[holder].blocks)

    def num_only(self, holder: str) -> int:
        """Blocks that no other holder has."""
        found = self._holders[holder]
        mask = 1 << found.bit
        return sum(self._masks[block] == mask for block in found.blocks)

    def holders_of(self, block: bytes) -> frozenset[str]:
        mask = self._masks.get(block, 0)
        return frozenset(name for name, holder in self._holders.items() if mask >> holder.bit & 1)

    def _step(self, holder: _Holder, events: KvEvents) -> None:
        stored, removed = split_hashes(events.stored), split_hashes(events.removed)
        # A block that a step removed and stored again is held.
        self._discard(holder, removed)
        self._store(holder, stored)
        holder.sequence = events.sequence
        holder.behind_since = None

    def _replace(self, holder: _Holder, snapshot: KvEvents) -> None:
        held = set(split_hashes(snapshot.stored))
        self._discard(holder, holder.blocks - held)
        self._store(holder, held)
        holder.sequence = snapshot.sequence
        holder.asked_at = holder.behind_since = None

    def _catch_up(self, holder: _Holder, now: float) -> bool:
        """Apply what was kept aside; True if that has a gap as well."""
        assert holder.sequence is not None
        for events in sorted(holder.aside, key=lambda events: events.sequence):
            if events.sequence > holder.sequence + 1:
                holder.sequence = None
                return self._want(holder, now)
            if events.sequence == holder.sequence + 1:
                self._step(holder, events)
        holder.aside.clear()
        return False

    def _put_aside(self, holder: _Holder, events: KvEvents) -> None:
        if len(holder.aside) >= MAX_ASIDE:
            holder.aside.clear()
        holder.aside.append(events)

    def _want(self, holder: _Holder, now: float) -> bool:
        if holder.asked_at is not None and now - holder.asked_at <= SNAPSHOT_WAIT_S:
            return False
        holder.asked_at = now
        return True

    def _store(self, holder: _Holder, blocks: Collection[bytes]) -> None:
        mask = 1 << holder.bit
        masks = self._masks
        holder.blocks.update(blocks)
        before, after = 0, mask
        for block in blocks:
            held = masks.get(block, 0)
            # Blocks of a chain share one mask as an object, which saves time and memory when there are many workers.
            if held is not before:
                before, after = held, held | mask
            masks[block] = after

    def _discard(self, holder: _Holder, blocks: Collection[bytes]) -> None:
        keep = ~(1 << holder.bit)
        masks = self._masks
        holder.blocks.difference_update(blocks)
        before = left = 0
        for block in blocks:
            held = masks.get(block, 0)
            if held is not before:
                before, left = held, held & keep
            if left:
                masks[block] = left
            else:
                masks.pop(block, None)
