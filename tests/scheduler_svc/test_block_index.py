"""The index of blocks against a naive model, gaps and snapshots included."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.block_index import MAX_ASIDE, SNAPSHOT_WAIT_S, BlockIndex
from tests.support.scheduling import block, make_events
from weft.messages import KvEvents

ALL = -1  # every worker is a candidate


def make_index(*holders: str) -> BlockIndex:
    index = BlockIndex()
    for holder in holders:
        index.add(holder, 1)
        index.check_sequence(holder, 0, 0.0)
    return index


def blocks(*numbers: int) -> bytes:
    return b"".join(map(block, numbers))


def numbers_of(index: BlockIndex, holder: str = "w0") -> set[int]:
    return {int.from_bytes(found, "big") for found in index.blocks_of(holder)}


def test_match_counts_leading_blocks_only() -> None:
    index = make_index("w0", "w1", "w2", "w3")
    for holder, held in {"w0": [1, 2, 3], "w1": [1, 3], "w2": [2, 3], "w3": []}.items():
        index.apply(make_events(1, held, holder=holder), 0.0)
    match = index.match(blocks(1, 2, 3, 4), ALL)
    assert (match.longest, match.holders) == (3, 0b1)
    assert [match.depth(bit) for bit in range(4)] == [3, 1, 0, 0]


def test_match_sees_candidates_only() -> None:
    index = make_index("w0", "w1")
    index.apply(make_events(1, [1, 2], holder="w0"), 0.0)
    index.apply(make_events(1, [1], holder="w1"), 0.0)
    match = index.match(blocks(1, 2), 0b10)
    assert (match.longest, match.holders, match.depth(0)) == (1, 0b10, 0)


def test_match_of_an_empty_prompt_is_empty() -> None:
    assert make_index("w0").match([], ALL).longest == 0


def test_bits_of_holders_that_left_are_used_again() -> None:
    index = make_index("w0", "w1")
    index.apply(make_events(1, [1], holder="w0"), 0.0)
    index.remove("w0")
    assert index.num_blocks == 0
    assert index.add("w2", 1) == 0
    assert index.match(blocks(1), ALL).longest == 0


def test_events_of_another_life_or_an_unknown_holder_change_nothing() -> None:
    index = make_index("w0")
    assert not index.apply(make_events(1, [1], epoch=2), 0.0)
    assert not index.apply(make_events(1, [1], holder="cache-0"), 0.0)
    assert index.num_blocks == 0


def test_repeated_event_changes_nothing() -> None:
    index = make_index("w0")
    index.apply(make_events(1, [1]), 0.0)
    index.apply(make_events(2, [], [1]), 0.0)
    assert not index.apply(make_events(1, [1]), 0.0)
    assert numbers_of(index) == set()


def test_gap_wants_a_snapshot_once_and_keeps_later_events_aside() -> None:
    index = make_index("w0")
    index.apply(make_events(1, [1]), 0.0)
    assert index.apply(make_events(3, [3]), 0.1)
    assert not index.apply(make_events(4, [4], [1]), 0.2)
    assert not index.apply(make_events(5, [5]), 0.3)
    assert not index.apply(make_events(4, [1, 2, 4], snapshot=True), 0.4)
    assert numbers_of(index) == {1, 2, 4, 5}


def test_gap_in_what_was_kept_aside_wants_another_snapshot() -> None:
    index = make_index("w0")
    assert index.apply(make_events(3, [3]), 0.1)
    index.apply(make_events(6, [6]), 0.2)
    assert index.apply(make_events(4, [4], snapshot=True), 0.3)
    assert not index.apply(make_events(6, [6, 7], snapshot=True), 0.4)
    assert numbers_of(index) == {6, 7}


def test_unanswered_snapshot_is_asked_for_again_with_a_later_status() -> None:
    index = make_index("w0")
    assert index.apply(make_events(2, [2]), 0.0)
    assert not index.check_sequence("w0", 2, SNAPSHOT_WAIT_S)
    assert index.check_sequence("w0", 2, SNAPSHOT_WAIT_S + 0.1)


def test_event_that_only_a_status_tells_of_is_missed_after_a_while() -> None:
    index = make_index("w0")
    assert not index.check_sequence("w0", 1, 0.0)
    assert not index.check_sequence("w0", 1, SNAPSHOT_WAIT_S)
    assert index.check_sequence("w0", 1, SNAPSHOT_WAIT_S + 0.1)
    index.apply(make_events(1, [1], snapshot=True), 3.0)
    assert not index.check_sequence("w0", 1, 3.1)


def test_old_snapshot_does_not_undo_newer_events() -> None:
    index = make_index("w0")
    index.apply(make_events(1, [1]), 0.0)
    index.apply(make_events(2, [2]), 0.0)
    index.apply(make_events(1, [1], snapshot=True), 0.1)
    assert numbers_of(index) == {1, 2}


def test_what_is_kept_aside_is_bounded() -> None:
    index = make_index("w0")
    for sequence in range(2, 3 * MAX_ASIDE):
        index.apply(make_events(sequence, [sequence]), 0.0)
    index.apply(make_events(3 * MAX_ASIDE - 1, [7], snapshot=True), 0.1)
    assert numbers_of(index) == {7}


few_blocks = st.lists(st.integers(0, 12), max_size=5, unique=True)
events = st.lists(st.tuples(st.integers(0, 2), few_blocks, few_blocks, st.booleans()), max_size=40)


@settings(max_examples=150, deadline=None)
@given(events, st.lists(few_blocks, max_size=5))
def test_index_equals_a_naive_model_even_if_messages_are_lost(
    plan: list[tuple[int, list[int], list[int], bool]], prompts: list[list[int]]
) -> None:
    holders = ("w0", "w1", "w2")
    index, naive = make_index(*holders), {holder: set[int]() for holder in holders}
    sequences = dict.fromkeys(holders, 0)
    now = 0.0
    for number, stored, removed, is_lost in plan:
        holder, now = holders[number], now + 0.1
        naive[holder] = (naive[holder] - set(removed)) | set(stored)
        sequences[holder] += 1
        if not is_lost and index.apply(make_events(sequences[holder], stored, removed, holder=holder), now):
            index.apply(snapshot_of(holder, naive[holder], sequences[holder]), now)
    for holder in holders:
        # The last message may have been lost, which statuses tell in the end.
        if index.check_sequence(holder, sequences[holder], now) or index.check_sequence(
            holder, sequences[holder], now + 2 * SNAPSHOT_WAIT_S
        ):
            index.apply(snapshot_of(holder, naive[holder], sequences[holder]), now)
        assert numbers_of(index, holder) == naive[holder]
    for number in range(13):
        assert index.holders_of(block(number)) == {holder for holder in holders if number in naive[holder]}
    for prompt in prompts:
        match = index.match(blocks(*prompt), ALL)
        for bit, holder in enumerate(holders):
            assert match.depth(bit) == leading(prompt, naive[holder])
        assert match.longest == max(leading(prompt, naive[holder]) for holder in holders)


def snapshot_of(holder: str, held: set[int], sequence: int) -> KvEvents:
    return make_events(sequence, sorted(held), holder=holder, snapshot=True)


def leading(prompt: list[int], held: set[int]) -> int:
    return next((depth for depth, number in enumerate(prompt) if number not in held), len(prompt))
