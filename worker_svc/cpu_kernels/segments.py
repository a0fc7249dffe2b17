"""What the kernels of attention compute: rows together, and what they see as keys in runs of slots.

Unlike the parts of `attention_plan`, whose keys are views of the cache, a segment is as long as the context: in a cache
that has been full for a while a sequence's blocks lie here and there, and kernels gather what a run is too short for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import Family, families_within, joined, runs_of
from worker_svc.step_input import StepInput


@dataclass(frozen=True, slots=True)
class Segment:
    """Some rows and some keys: the first row sees the first `num_seen` keys, and each row after it one more."""

    first_row: int  # of the step
    num_rows: int
    runs: tuple[tuple[int, int], ...]  # (slot, count)
    num_keys: int  # in all runs; no row sees more
    num_seen: int
    window: int | None = None  # of what it sees, a row sees so many last ones

    def num_seen_by(self, row: int) -> int:
        """How many keys a row of the step sees of those that no window hides."""
        return min(self.num_seen + row - self.first_row, self.num_keys)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are computed together; every row of a step is in one group."""

    first_row: int  # of the step
    num_rows: int
    family: Family
    step: StepInput
    window: int | None

    def rows(self) -> Iterator[tuple[int, list[int], int, int]]:
        """Each row, its block table, the first position that it sees there, and the one after the last."""
        row = self.first_row
        for i in self.family.members:
            stop = self.step.seq_lens[i]
            for end in range(stop - self.step.query_lens[i] + 1, stop + 1):
                yield row, self.step.block_tables[i], 0 if self.window is None else max(0, end - self.window), end
                row += 1

    def segments(self) -> Iterator[Segment]:
        """What all rows see, and what those of each sequence see."""
        tables, shared = self.step.block_tables, self.family.num_shared_blocks * BLOCK_SIZE
        if shared:
            runs = [(slot, count) for _, slot, count in runs_of(tables[self.family.members[0]], 0, shared)]
            yield Segment(self.first_row, self.num_rows, tuple(joined(runs)), shared, shared)
        row = self.first_row
        for i in self.family.members:
            count, stop = self.step.query_lens[i], self.step.seq_lens[i]
            start = stop - count
            begin = shared if self.window is None else max(0, start + 1 - self.window)
            runs = [(slot, length) for _, slot, length in runs_of(tables[i], begin, stop)]
            # A single row sees all of its keys, in whatever order.
            keys = tuple(joined(runs) if count == 1 else runs)
            yield Segment(row, count, keys, stop - begin, start + 1 - begin, self.window)
            row += count


def plan_groups(families: Iterable[Family], step: StepInput, window: int | None) -> Iterator[Group]:
    """Groups of the rows that `attention_plan.order_rows` gives. `window`: tokens that a row sees, itself included."""
    row = 0
    for family in families_within(window, families):
        num_rows = sum(step.query_lens[i] for i in family.members)
        yield Group(row, num_rows, family, step, window)
        row += num_rows
