"""What attends to what in a step, as runs of consecutive slots: no list of slots, and no copy of any context.

A block table is mostly a few runs of consecutive blocks, and keys and values of a run are views of the cache. Where
queries see all of a run the order within it does not matter, so blocks make one run in whatever order a table has
them. Sequences that share a prefix attend to it together, with one product of matrices instead of one a sequence
(Juravsky et al. 2024, Hydragen). Only the step's own tokens and the edge of a sliding window need masks, which are as
large as the step's tokens and never as the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from weft.hashing import BLOCK_SIZE
from worker_svc.step_input import StepInput

# Rows of a sequence so few that it costs less to hide each other's keys from them than to see those in another run.
MAX_FEW_ROWS: Final = 16
# Blocks that sequences must share to attend to them together.
MIN_SHARED_BLOCKS: Final = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a unit against one run of slots."""

    first_row: int  # of the unit
    num_rows: int
    first_slot: int
    num_keys: int
    column: int  # of its first key among the unit's scores
    is_causal: bool = False  # the last row sees all keys, and each row one more than the one before it
    edge: int | None = None  # row i sees keys from `i + edge` on


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that are computed together; every row of a step is in one unit."""

    first_row: int  # of the step
    num_rows: int
    num_columns: int  # of its scores
    parts: tuple[Part, ...]

    def cut(self, max_rows: int) -> Iterator[Unit]:
        """The same in units of at most `max_rows` rows."""
        for first in range(0, self.num_rows, max_rows):
            last = min(first + max_rows, self.num_rows)
            parts = tuple(piece for part in self.parts for piece in _cut(part, first, last))
            yield Unit(self.first_row + first, last - first, _num_columns(parts), parts)


@dataclass(frozen=True, slots=True)
class Family:
    """Sequences that have their first blocks in common; mostly one alone, which shares nothing."""

    members: tuple[int, ...]
    num_shared_blocks: int = 0


def find_families(step: StepInput) -> list[Family]:
    """Every sequence in one family."""
    befores = [total - count for total, count in zip(step.seq_lens, step.query_lens, strict=True)]
    alike: dict[int, list[int]] = {}
    for i, before in enumerate(befores):
        # Negative, so no block: alone.
        is_long = before >= MIN_SHARED_BLOCKS * BLOCK_SIZE
        alike.setdefault(step.block_tables[i][MIN_SHARED_BLOCKS - 1] if is_long else -1 - i, []).append(i)
    families: list[Family] = []
    for members in alike.values():
        shared = 0
        if len(members) > 1:
            common = _num_common([step.block_tables[i] for i in members])
            shared = min(common, min(befores[i] for i in members) // BLOCK_SIZE)
        if shared >= MIN_SHARED_BLOCKS:
            families.append(Family(tuple(members), shared))
        else:
            families += [Family((i,)) for i in members]
    return families


def _num_common(tables: Sequence[list[int]]) -> int:
    """How many first blocks all tables have in common."""
    # Of all lists in order, what the first and the last have in common those between them have, too.
    low, high = min(tables), max(tables)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def order_rows(families: Iterable[Family], query_lens: Sequence[int]) -> list[int]:
    """The step's rows, family by family."""
    starts, start = [], 0
    for count in query_lens:
        starts.append(start)
        start += count
    return [row for family in families for i in family.members for row in range(starts[i], starts[i] + query_lens[i])]


def families_within(window: int | None, families: Iterable[Family]) -> Iterator[Family]:
    """Sequences that attend together: what a window leaves of a shared prefix is another part for each member."""
    for family in families:
        yield from [family] if window is None else [Family((i,)) for i in family.members]


def plan_units(families: Iterable[Family], step: StepInput, window: int | None) -> tuple[Unit, ...]:
    """Units of the rows that `order_rows` gives. `window`: how many tokens a query sees, itself included."""
    units: list[Unit] = []
    row = 0
    for family in families_within(window, families):
        units.append(_plan_unit(row, family, step, window))
        row += units[-1].num_rows
    return tuple(units)


def _plan_unit(first_row: int, family: Family, step: StepInput, window: int | None) -> Unit:
    num_rows = sum(step.query_lens[i] for i in family.members)
    shared = family.num_shared_blocks * BLOCK_SIZE
    parts: list[Part] = []
    if shared:
        parts += _whole(0, num_rows, step.block_tables[family.members[0]], 0, shared, 0)
    row = 0
    for i in family.members:
        table, stop = step.block_tables[i], step.seq_lens[i]
        start = stop - step.query_lens[i]
        for first, last in _chunks(start, stop, window):
            parts += _see(row + first - start, table, first, last, shared, window)
        row += stop - start
    return Unit(first_row, num_rows, _num_columns(parts), tuple(parts))


def _num_columns(parts: Iterable[Part]) -> int:
    return max(part.column + part.num_keys for part in parts)


def _cut(part: Part, first_row: int, last_row: int) -> Iterator[Part]:
    """What rows `first_row` to `last_row` of the unit have of a part, as a unit of their own."""
    first = max(part.first_row, first_row)
    num_rows = min(part.first_row + part.num_rows, last_row) - first
    if num_rows <= 0:
        return
    skipped, row = first - part.first_row, first - first_row
    if not part.is_causal:
        edge = None if part.edge is None else part.edge + skipped
        yield replace(part, first_row=row, num_rows=num_rows, edge=edge)
        return
    seen = skipped + part.num_keys - part.num_rows
    if seen:
        yield Part(row, num_rows, part.first_slot, seen, part.column)
    yield Part(row, num_rows, part.first_slot + seen, num_rows, part.column + seen, is_causal=True)


def _chunks(start: int, stop: int, window: int | None) -> Iterator[tuple[int, int]]:
    """Queries at positions `start` to `stop`, so few at a time that the last sees the first."""
    size = window or stop - start
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _see(row: int, table: Sequence[int], first: int, last: int, shared: int, window: int | None) -> Iterator[Part]:
    """Parts of the queries at positions `first` to `last`: what slides out of the window, what all see, themselves."""
    num_rows, column = last - first, shared
    seen_by_one, seen_by_all = shared, shared
    if window is not None:
        seen_by_one, seen_by_all = max(0, first - window + 1), max(0, last - window)
    for position, slot, count in runs_of(table, seen_by_one, seen_by_all):
        edge = first - (window or 0) + 1 - position
        # The others see none of these.
        yield Part(row, min(num_rows, count - edge), slot, count, column, edge=edge)
        column += count
    # A single query is the last key it sees, and a few are the last keys of their run.
    own = last if num_rows == 1 else first
    if 1 < num_rows <= MAX_FEW_ROWS:
        position, slot, count = runs_of(table, seen_by_all, last)[-1]
        if position < first:
            for part in _whole(row, num_rows, table, seen_by_all, position, column):
                yield part
                column += part.num_keys
            yield Part(row, num_rows, slot, count, column, is_causal=True)
            return
    for part in _whole(row, num_rows, table, seen_by_all, own, column):
        yield part
        column += part.num_keys
    for position, slot, count in runs_of(table, own, last):
        offset = position - first
        yield Part(row + offset, count, slot, count, column, is_causal=True)
        if offset + count < num_rows:
            yield Part(row + offset + count, num_rows - offset - count, slot, count, column)
        column += count


def _whole(row: int, num_rows: int, table: Sequence[int], start: int, stop: int, column: int) -> Iterator[Part]:
    """Parts of rows that see all tokens from `start` to `stop`, in any order."""
    slots = [(slot, count) for _, slot, count in runs_of(table, start, stop)]
    if len(slots) > 1:
        slots = joined(slots)
    for slot, count in slots:
        yield Part(row, num_rows, slot, count, column)
        column += count


def runs_of(table: Sequence[int], start: int, stop: int) -> list[tuple[int, int, int]]:
    """(position, slot, count) of each run of consecutive slots that hold the tokens from `start` to `stop`."""
    if start >= stop:
        return []
    first, last = start // BLOCK_SIZE, (stop - 1) // BLOCK_SIZE
    block = table[first]
    if list(table[first : last + 1]) == list(range(block, block + last + 1 - first)):
        return [(start, block * BLOCK_SIZE + start % BLOCK_SIZE, stop - start)]
    runs: list[tuple[int, int, int]] = []
    begins = [first, *(i for i in range(first + 1, last + 1) if table[i] != table[i - 1] + 1), last + 1]
    for begin, end in zip(begins, begins[1:], strict=False):
        position = max(start, begin * BLOCK_SIZE)
        slot = table[begin] * BLOCK_SIZE + position - begin * BLOCK_SIZE
        runs.append((position, slot, min(stop, end * BLOCK_SIZE) - position))
    return runs


def joined(slots: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs that touch, as one, in the order of the slots."""
    found: list[tuple[int, int]] = []
    for slot, count in sorted(slots):
        if found and sum(found[-1]) == slot:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((slot, count))
    return found
