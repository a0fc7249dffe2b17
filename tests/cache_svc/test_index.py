"""The tables of both tiers against simple models of what they promise."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from cache_svc.index import Location, LruTable, SegmentTable

keys = st.integers(0, 12).map(lambda i: i.to_bytes(16, "big"))
sizes = st.integers(1, 60)
operations = st.lists(st.tuples(st.sampled_from(["put", "touch", "forget"]), keys, sizes), max_size=120)
BUDGET = 100


@settings(deadline=None)
@given(operations)
def test_the_memory_table_is_an_exact_lru(history: list[tuple[str, bytes, int]]) -> None:
    table, model = LruTable(BUDGET), OrderedDict[bytes, int]()
    for verb, key, size in history:
        if verb == "put" and key not in model:
            expected: list[bytes] = []
            while sum(model.values()) + size > BUDGET:
                expected.append(model.popitem(last=False)[0])
            model[key] = size
            assert table.put(key, size) == expected
        elif verb == "touch" and key in model:
            model.move_to_end(key)
            table.touch(key)
        table.check()
        assert all((key in table) == (key in model) for _, key, _ in history)


def test_what_is_larger_than_the_budget_is_refused_and_evicts_nothing() -> None:
    table = LruTable(BUDGET)
    table.put(b"a", BUDGET)
    assert table.put(b"b", BUDGET + 1) is None
    assert b"a" in table


@settings(deadline=None)
@given(operations, st.integers(1, 120))
def test_segments_go_whole_and_least_recently_used_first(
    history: list[tuple[str, bytes, int]], segment_size: int
) -> None:
    table = SegmentTable(BUDGET, segment_size)
    model = OrderedDict[int, list[tuple[bytes, int]]]()  # segment → its records; least recently used first
    live: dict[bytes, int] = {}
    opened = -1
    segment_size = min(segment_size, BUDGET)
    for verb, key, size in history:
        if verb == "put" and key not in live:
            if opened not in model or sum(length for _, length in model[opened]) + size > segment_size:
                opened = max([opened, *model]) + 1
                model[opened] = []
            gone = []
            while sum(length for records in model.values() for _, length in records) + size > BUDGET:
                oldest = next(number for number in model if number != opened)
                live = {k: number for k, number in live.items() if number != oldest}
                del model[oldest]
                gone.append(oldest)
            offset = sum(length for _, length in model[opened])
            model[opened].append((key, size))
            model.move_to_end(opened)
            live[key] = opened
            placement = table.append(key, size)
            assert placement is not None
            assert placement.location == Location(opened, offset, size)
            assert list(placement.dropped) == gone
        elif verb == "touch" and key in live:
            model.move_to_end(live[key])
            table.touch(key)
        elif verb == "forget":
            live.pop(key, None)
            table.forget([key])
        table.check()
        assert all((key in table) == (key in live) for _, key, _ in history)


def test_a_record_larger_than_a_segment_has_one_to_itself() -> None:
    table = SegmentTable(BUDGET, segment_size=10)
    placements = [table.append(bytes([i]), 25) for i in range(4)]
    assert [placement.location.segment for placement in placements if placement] == [0, 1, 2, 3]
    assert table.append(b"more", BUDGET + 1) is None


def test_segments_found_at_start_are_kept_as_far_as_the_budget_goes() -> None:
    table = SegmentTable(BUDGET, segment_size=50)
    table.adopt(3, 60, {b"old": Location(3, 0, 60)})
    table.adopt(5, 40, {})
    table.adopt(7, 50, {b"new": Location(7, 0, 50)})
    assert table.trim() == (5, 3)
    assert b"new" in table and b"old" not in table
    placement = table.append(b"next", 10)
    assert placement is not None and placement.location.segment == 8
    table.check()


def test_of_a_key_found_twice_the_later_record_counts() -> None:
    table = SegmentTable(BUDGET, segment_size=50)
    table.adopt(0, 10, {b"k": Location(0, 0, 10)})
    table.adopt(1, 10, {b"k": Location(1, 0, 10)})
    assert table.locate(b"k") == Location(1, 0, 10)
    assert table.trim() == (0,)
    table.check()


def test_after_a_failed_write_records_go_to_another_segment() -> None:
    table = SegmentTable(BUDGET, segment_size=50)
    table.append(b"a", 10)
    table.forget([b"a"])
    table.close()
    placement = table.append(b"b", 10)
    assert placement is not None and placement.location == Location(1, 0, 10)
    table.check()
