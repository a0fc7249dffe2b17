"""What rows see, read off the plan and from the definition."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import MIN_SHARED_BLOCKS, Unit, find_families, order_rows, plan_units
from worker_svc.step_input import StepInput

# (tokens before the step, tokens of the step, whether it has the common prefix)
LENS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.booleans()), min_size=1, max_size=6)
LAYOUTS = ("in a row", "backwards", "in runs", "scattered")


@dataclass(frozen=True)
class Case:
    step: StepInput
    window: int | None

    def units(self) -> tuple[Unit, ...]:
        return plan_units(find_families(self.step), self.step, self.window)


def make_case(lens: list[tuple[int, int, bool]], layout: str, seed: int, window: int | None) -> Case:
    free = list(range(400))
    if layout == "backwards":
        free.reverse()
    elif layout == "in runs":
        runs = [free[i : i + 3] for i in range(0, len(free), 3)]
        random.Random(seed).shuffle(runs)
        free = [block for run in runs for block in run]
    elif layout == "scattered":
        random.Random(seed).shuffle(free)
    prefix = [free.pop(0) for _ in range(MIN_SHARED_BLOCKS + 2)]
    seq_lens, tables = [], []
    for before, count, is_shared in lens:
        shared = prefix if is_shared else []
        length = len(shared) * BLOCK_SIZE + before + count
        tables.append(shared + [free.pop(0) for _ in range(-(-length // BLOCK_SIZE) - len(shared))])
        seq_lens.append(length)
    counts = [count for _, count, _ in lens]
    return Case(StepInput([], [], [], counts, seq_lens, tables, []), window)


def wanted(case: Case) -> list[set[int]]:
    """The slots that each row sees, in the order of the step's rows."""
    rows = []
    for count, length, table in zip(case.step.query_lens, case.step.seq_lens, case.step.block_tables, strict=True):
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        for position in range(length - count, length):
            first = 0 if case.window is None else max(0, position - case.window + 1)
            rows.append(set(slots[first : position + 1]))
    return rows


def planned(units: tuple[Unit, ...]) -> list[set[int]]:
    """The same from a plan; no row sees a slot twice, nor two of its slots in one column."""
    rows: list[set[int]] = []
    for unit in units:
        assert unit.first_row == len(rows)
        places: list[dict[int, int]] = [{} for _ in range(unit.num_rows)]
        for part in unit.parts:
            for i in range(part.num_rows):
                stop = part.num_keys - (part.num_rows - 1 - i if part.is_causal else 0)
                for key in range(max(0, i + part.edge) if part.edge is not None else 0, stop):
                    column = part.column + key
                    assert column < unit.num_columns and column not in places[part.first_row + i]
                    places[part.first_row + i][column] = part.first_slot + key
        seen = [set(place.values()) for place in places]
        assert [len(slots) for slots in seen] == [len(place) for place in places]
        rows += seen
    return rows


@given(LENS, st.sampled_from(LAYOUTS), st.integers(0, 99), st.sampled_from([None, 1, 5, 16, 40, 1000]))
@settings(max_examples=150, deadline=None)
def test_every_row_sees_its_window_of_its_own_sequence(
    lens: list[tuple[int, int, bool]], layout: str, seed: int, window: int | None
) -> None:
    case = make_case(lens, layout, seed, window)
    rows = order_rows(find_families(case.step), case.step.query_lens)
    expected = wanted(case)
    assert sorted(rows) == list(range(len(expected)))
    assert planned(case.units()) == [expected[row] for row in rows]


@given(LENS, st.sampled_from(LAYOUTS), st.integers(0, 99), st.sampled_from([None, 5, 40]), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_cut_units_see_the_same(
    lens: list[tuple[int, int, bool]], layout: str, seed: int, window: int | None, max_rows: int
) -> None:
    units = make_case(lens, layout, seed, window).units()
    pieces = tuple(piece for unit in units for piece in unit.cut(max_rows))
    assert all(piece.num_rows <= max_rows for piece in pieces)
    assert planned(pieces) == planned(units)


@given(LENS, st.integers(0, 99), st.sampled_from([5, 40]))
@settings(max_examples=60, deadline=None)
def test_every_row_of_a_part_sees_one_of_its_keys(lens: list[tuple[int, int, bool]], seed: int, window: int) -> None:
    # Flash attention of a row that sees nothing is not a number.
    for unit in make_case(lens, "scattered", seed, window).units():
        for part in unit.parts:
            assert part.edge is None or part.num_rows - 1 + part.edge < part.num_keys


@pytest.mark.parametrize("layout", ["in a row", "backwards"])
def test_decode_of_consecutive_blocks_is_one_run_in_any_order(layout: str) -> None:
    case = make_case([(63, 1, False)], layout, 0, None)
    assert [part.num_keys for unit in case.units() for part in unit.parts] == [64]


def test_sequences_that_share_a_prefix_attend_to_it_together() -> None:
    case = make_case([(5, 1, True), (9, 1, False), (30, 7, True)], "in a row", 0, None)
    assert [unit.num_rows for unit in case.units()] == [8, 1]
    shared = case.units()[0].parts[0]
    assert (shared.num_rows, shared.num_keys) == (8, (MIN_SHARED_BLOCKS + 2) * BLOCK_SIZE)


def test_masks_are_as_large_as_the_step_and_not_as_the_context() -> None:
    step = StepInput([], [], [], [20], [32_000], [list(range(2000))], [])
    parts = [part for window in (None, 4096) for unit in Case(step, window).units() for part in unit.parts]
    masked = [part for part in parts if part.is_causal or part.edge is not None]
    assert masked and all(part.num_keys <= 20 for part in masked)
