from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weft.replicas import Change, Replica, plan_change

REPLICAS = st.lists(st.builds(Replica, st.text("abcdef", min_size=1), st.booleans(), st.floats(0, 9)), max_size=6)


@given(REPLICAS, st.integers(0, 9))
def test_a_change_makes_it_as_many_as_are_wanted(replicas: list[Replica], target: int) -> None:
    change = plan_change(replicas, target, ())
    assert len(replicas) + change.num_more - len(change.leaving) == target
    assert not (change.num_more and change.leaving)


def test_those_that_start_go_first_the_youngest_before_the_others() -> None:
    replicas = [Replica("old", True, 1.0), Replica("b", False, 2.0), Replica("c", False, 3.0)]
    assert plan_change(replicas, 1, ["old"]) == Change(leaving=("c", "b"))


def test_ready_ones_go_as_the_advice_says_and_those_it_does_not_know_last() -> None:
    replicas = [Replica(name, True, 1.0) for name in ("a", "b", "c")]
    assert plan_change(replicas, 0, ["c", "b"]) == Change(leaving=("c", "b", "a"))
