"""The table of held requests against its promises, by hand and by random histories."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ring import make_request
from worker_svc.held import HeldTable


def table_with(*taken: tuple[str, int], slots: tuple[int, ...] = (0, 1)) -> HeldTable:
    table = HeldTable()
    for request_id, epoch in taken:
        table.take(make_request(request_id, epoch=epoch, slots=slots), {})
    return table


def test_a_request_is_held_until_its_last_choice_ends() -> None:
    table = table_with(("a", 0))
    table.finish("a", 0, 0)
    assert (len(table), table.num_sequences) == (1, 1)
    table.finish("a", 0, 0)
    table.finish("a", 1, 1)
    assert (len(table), table.num_sequences) == (1, 1)
    table.finish("a", 0, 1)
    assert (len(table), table.num_sequences) == (0, 0)


def test_the_held_epoch_and_those_below_are_stale() -> None:
    table = table_with(("a", 3))
    assert [table.is_stale("a", epoch) for epoch in (2, 3, 4)] == [True, True, False]
    assert not table.is_stale("b", 0)


def test_a_cancel_covers_its_epoch_and_those_below_even_before_they_come() -> None:
    table = HeldTable()
    assert not table.cancel("a", 3)
    assert [table.is_stale("a", epoch) for epoch in (2, 3, 4)] == [True, True, False]
    table.cancel("a", 1)
    assert table.is_stale("a", 3)


def test_a_cancel_of_an_old_epoch_leaves_the_new_one() -> None:
    table = table_with(("a", 3))
    assert not table.cancel("a", 2)
    assert table.get("a", 3) is not None


def test_a_cancel_of_some_choices_is_not_remembered_against_the_request() -> None:
    table = table_with(("a", 0))
    assert table.cancel("a", 0, [1])
    assert not table.cancel("a", 0, [7])
    assert table.num_sequences == 1
    table.end("a", 0)
    assert not table.is_stale("a", 0)


ids, epochs, slots = st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 2)
operations = st.one_of(
    st.tuples(st.just("take"), ids, epochs, st.just(0)),
    st.tuples(st.just("cancel"), ids, epochs, st.just(0)),
    st.tuples(st.just("cancel_slot"), ids, epochs, slots),
    st.tuples(st.just("finish"), ids, epochs, slots),
    st.tuples(st.just("end"), ids, epochs, st.just(0)),
)


@settings(deadline=None)
@given(st.lists(operations, max_size=60))
def test_the_books_balance_after_any_history(history: list[tuple[str, str, int, int]]) -> None:
    table = HeldTable()
    for verb, request_id, epoch, slot in history:
        match verb:
            case "take":
                if not table.is_stale(request_id, epoch):
                    if epoch:
                        table.cancel(request_id, epoch - 1)
                    table.take(make_request(request_id, epoch=epoch, slots=(0, 1, 2)), {})
            case "cancel":
                table.cancel(request_id, epoch)
                assert table.is_stale(request_id, epoch)
            case "cancel_slot":
                table.cancel(request_id, epoch, [slot])
            case "finish":
                table.finish(request_id, epoch, slot)
            case "end":
                table.end(request_id, epoch)
        table.check()
        assert all(held in table.of_gateway(held.gateway) for held in table)
