"""Which blocks each tier keeps, where, and which go first. Pure: no bytes of blocks, no files, no clock.

The memory tier evicts block by block, least recently used first. The disk tier is a log of segments: blocks are
appended to the newest, and to make room whole segments go, the one whose blocks have been unused for longest first,
so that nothing is ever rewritten (a prompt's blocks are written together, and are used together).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weft.errors import InvariantViolation


class LruTable:
    """Keys and their sizes under a byte budget; the least recently used go first."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self.used = 0  # bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def put(self, key: bytes, size: int) -> list[bytes] | None:
        """Keep a key that is not there yet, as the most recently used; None if it is larger than the budget.

        Returns:
            The keys evicted for it, least recently used first.
        """
        if size > self._budget:
            return None
        evicted: list[bytes] = []
        while self.used + size > self._budget:
            oldest, freed = self._sizes.popitem(last=False)
            self.used -= freed
            evicted.append(oldest)
        self._sizes[key] = size
        self.used += size
        return evicted

    def touch(self, key: bytes) -> None:
        """Make a key that is there the most recently used."""
        self._sizes.move_to_end(key)

    def check(self) -> None:
        """Raises InvariantViolation if the sizes do not add up, or are over the budget."""
        if self.used != sum(self._sizes.values()) or self.used > self._budget:
            raise InvariantViolation(f"{self.used} bytes used of {self._budget}, {sum(self._sizes.values())} kept")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record is: bytes [offset, offset + length) of a segment."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to write a record, and which segments to delete before."""

    location: Location
    dropped: tuple[int, ...]


@dataclass(slots=True)
class _Segment:
    size: int = 0  # bytes, those of skipped records included
    keys: set[bytes] = field(default_factory=set)


class SegmentTable:
    """Keys and where their records are, in numbered segments under a byte budget."""

    def __init__(self, budget: int, segment_size: int) -> None:
        self._budget = budget
        # So that dropping all others always makes room in the open one.
        self._segment_size = min(segment_size, budget)
        self._segments: OrderedDict[int, _Segment] = OrderedDict()  # least recently used first
        self._locations: dict[bytes, Location] = {}
        self._open: int | None = None  # the segment that records are appended to
        self._next_number = 0
        self.used = 0  # bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def locate(self, key: bytes) -> Location | None:
        return self._locations.get(key)

    def append(self, key: bytes, length: int) -> Placement | None:
        """Place the record of a key that is not there yet; None if it is larger than the budget.

        A record larger than a segment has one to itself.
        """
        if length > self._budget:
            return None
        if self._open is None or self._segments[self._open].size + length > self._segment_size:
            self._open = self._next_number
            self._next_number += 1
            self._segments[self._open] = _Segment()
        dropped = self._make_room(length)
        segment = self._segments[self._open]
        location = Location(self._open, segment.size, length)
        segment.size += length
        segment.keys.add(key)
        self.used += length
        self._locations[key] = location
        self._segments.move_to_end(self._open)
        return Placement(location, dropped)

    def touch(self, key: bytes) -> None:
        """Make the segment of a key that is there the most recently used."""
        self._segments.move_to_end(self._locations[key].segment)

    def forget(self, keys: Iterable[bytes]) -> None:
        """The records of these keys turned out to be unreadable; their bytes go with their segment."""
        for key in keys:
            location = self._locations.pop(key, None)
            if location is not None:
                self._segments[location.segment].keys.discard(key)

    def close(self) -> None:
        """Append to this segment no more: a write to it failed."""
        self._open = None

    def adopt(self, number: int, size: int, records: Mapping[bytes, Location]) -> None:
        """Take in a segment found at start; to be called in the order of numbers, `trim` thereafter."""
        self.forget(records)
        self._segments[number] = _Segment(size, set(records))
        self._locations.update(records)
        self._next_number = number + 1
        self.used += size

    def trim(self) -> tuple[int, ...]:
        """Drop what is over the budget, and segments with nothing in them. Returns the segments to delete."""
        empty = [number for number, segment in self._segments.items() if not segment.keys and number != self._open]
        for number in empty:
            self._drop(number)
        return (*empty, *self._make_room(0))

    def check(self) -> None:
        """Raises InvariantViolation if sizes and keys do not add up, or are over the budget."""
        kept = sum(segment.size for segment in self._segments.values())
        keys = {key: number for number, segment in self._segments.items() for key in segment.keys}
        if kept != self.used or self.used > self._budget:
            raise InvariantViolation(f"{self.used} bytes used of {self._budget}, {kept} kept")
        if keys != {key: location.segment for key, location in self._locations.items()}:
            raise InvariantViolation("segments and locations name different keys")

    def _make_room(self, length: int) -> tuple[int, ...]:
        dropped: list[int] = []
        for number in list(self._segments):
            if self.used + length <= self._budget:
                break
            if number != self._open:
                self._drop(number)
                dropped.append(number)
        return tuple(dropped)

    def _drop(self, number: int) -> None:
        segment = self._segments.pop(number)
        self.used -= segment.size
        for key in segment.keys:
            del self._locations[key]
