"""Requests that workers hand back as they were told to: they go on elsewhere, each token once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.streams import MAX_WORKER_DEATHS
from tests.support.request_table import World
from weft import messages as m
from weft.columns import pack_u32, unpack_u32
from weft.errors import Unavailable


def goings(world: World) -> list[tuple[int, int, list[list[int]]]]:
    """Of each submission the epoch, how often it was handed back, and the tokens of its choices."""
    return [
        (message.epoch, message.yield_epoch, [unpack_u32(choice.emitted) for choice in message.choices])
        for message in world.submissions
    ]


def test_a_yielded_request_goes_on_with_its_tokens_and_without_a_cancel() -> None:
    world = World()
    world.frame(0, [1, 2, 3], finish=m.FINISH_YIELD)
    assert goings(world) == [(0, 0, [[]]), (1, 1, [[1, 2, 3]])]
    assert world.submissions[-1].choices[0].seed == 100
    assert (world.cancels, world.table.stats.recovered, world.table.stats.yielded) == ([], 0, 1)
    world.frame(3, [4], finish=m.FINISH_LENGTH, worker="w2", sequence=0)
    assert world.reader.deltas == {0: ["1", "2", "3", "4"]}
    assert (world.reader.ended, len(world.table), world.cancels) == (1, 0, [])


def test_a_request_may_be_handed_back_as_often_as_one_likes() -> None:
    world = World()
    for number in range(200):
        world.at(world.now + 0.1).event("started")
        world.frame(number, [number + 1], finish=m.FINISH_YIELD)
    assert goings(world)[-1][:2] == (200, 200)
    assert (world.request.worker_deaths, world.request.retries, world.reader.errors) == (0, 0, [])
    assert world.reader.deltas == {0: [str(number + 1) for number in range(200)]}


def test_a_request_goes_on_when_the_last_of_its_choices_has_been_handed_back() -> None:
    world = World(num_choices=3)
    world.frame(0, [1, 2], choice=0, finish=m.FINISH_YIELD)
    world.frame(0, [5], choice=1)
    world.frame(0, [7], choice=2, finish=m.FINISH_LENGTH)
    assert len(world.submissions) == 1
    world.frame(1, [6], choice=1, finish=m.FINISH_YIELD)
    assert goings(world)[1:] == [(1, 1, [[1, 2], [5, 6]])]
    assert [choice.slot for choice in world.submissions[-1].choices] == [0, 1]


@pytest.mark.parametrize("finish", [m.FINISH_LENGTH, m.FINISH_STOP])
def test_a_request_goes_on_when_its_last_running_choice_ends_by_itself(finish: int) -> None:
    world = World(num_choices=2)
    world.frame(0, [1, 2], choice=0, finish=m.FINISH_YIELD)
    world.frame(0, [5], choice=1, finish=finish)
    assert goings(world)[1:] == [(1, 1, [[1, 2]])]


def test_a_stop_string_in_the_last_tokens_before_a_yield_ends_the_stream() -> None:
    world = World()
    world.frame(0, [1, 0], finish=m.FINISH_YIELD)
    assert (world.reader.ended, len(world.table), len(world.submissions)) == (1, 0, 1)
    # The worker does not have it any more, so it cannot be asked to tell its length.
    assert world.cancels == [m.Cancel("r1", 0, "g1")]


@pytest.mark.parametrize("finish", [m.FINISH_NONE, m.FINISH_YIELD])
def test_a_stop_string_in_one_choice_lets_those_that_were_handed_back_go_on(finish: int) -> None:
    world = World(num_choices=2)
    world.frame(0, [1, 2], choice=0, finish=m.FINISH_YIELD)
    world.frame(0, [5, 0], choice=1, finish=finish)
    assert goings(world)[1:] == [(1, 1, [[1, 2]])]
    assert [cancel.slots for cancel in world.cancels] == [pack_u32([1])]
    world.frame(2, [3], choice=0, finish=m.FINISH_LENGTH)
    assert world.reader.ended == 1


def test_a_recovery_while_others_run_still_takes_what_was_handed_back_along() -> None:
    world = World(num_choices=2)
    world.frame(0, [1, 2], choice=0, finish=m.FINISH_YIELD)
    world.event("lost")
    assert goings(world)[1:] == [(1, 0, [[1, 2], []])]
    # A choice that had been handed back before the recovery has not been since.
    world.frame(0, [5], choice=1, finish=m.FINISH_YIELD)
    assert len(world.submissions) == 2
    world.frame(2, [3], choice=0, finish=m.FINISH_YIELD)
    assert goings(world)[2:] == [(2, 2, [[1, 2, 3], [5]])]
    assert world.reader.deltas == {0: ["1", "2", "3"], 1: ["5"]}


def test_a_yield_of_an_epoch_that_is_over_does_nothing() -> None:
    world = World()
    world.frame(0, [1])
    world.event("lost")
    world.frame(1, [2], finish=m.FINISH_YIELD, epoch=0)
    assert goings(world)[1:] == [(1, 0, [[1]])]
    assert world.table.stats.stale_rows == 1


def test_a_worker_that_leaves_after_the_yield_costs_no_token() -> None:
    world = World()
    world.frame(0, [1], finish=m.FINISH_YIELD)
    world.table.on_left("worker", "w1", world.now)
    assert goings(world)[1:] == [(1, 1, [[1]]), (2, 1, [[1]])]
    world.frame(1, [2], finish=m.FINISH_LENGTH, worker="w2", sequence=0)
    assert world.reader.deltas == {0: ["1", "2"]} and world.reader.ended == 1


def test_a_yield_that_came_after_a_lost_token_is_a_recovery() -> None:
    world = World()
    world.frame(0, [1])
    world.frame(2, [3], finish=m.FINISH_YIELD)
    assert goings(world)[1:] == [(1, 0, [[1]])]


def test_a_yield_that_was_lost_is_noticed_by_the_claims_that_do_not_come() -> None:
    world = World()
    world.frame(0, [1], sequence=0)
    world.at(m.CLAIM_LEASE_S + 0.1)
    assert goings(world)[1:] == [(1, 0, [[1]])]


def test_a_repeated_row_does_not_undo_a_yield() -> None:
    world = World(num_choices=2)
    world.frame(0, [1, 2], choice=0, finish=m.FINISH_YIELD)
    world.frame(0, [1], choice=0)
    world.frame(0, [5], choice=1, finish=m.FINISH_YIELD)
    assert goings(world)[1:] == [(1, 1, [[1, 2], [5]])]


class Worker:
    """Generates 1, 2, 3 … of each choice up to a goal, and hands back after a quantum."""

    def __init__(self, world: World, goal: int) -> None:
        self._world = world
        self._goal = goal
        self._epoch = -1
        self._next: dict[int, int] = {}  # by choice
        self._until: dict[int, int] = {}

    def step(self, choice: int, count: int, quantum: int, *, is_lost: bool) -> None:
        """Some tokens of a choice, if it has not come to the end of its quantum."""
        world = self._world
        if world.request.epoch != self._epoch:
            self._take(quantum)
        if choice not in self._next:
            return
        first = self._next[choice]
        last = min(first + count, self._until[choice])
        self._next[choice] = last
        finish = m.FINISH_NONE
        if last == self._until[choice]:
            finish = m.FINISH_LENGTH if last > self._goal else m.FINISH_YIELD
            del self._next[choice]
        if is_lost:
            world.sequence += 1
        else:
            world.frame(first - 1, list(range(first, last)), finish=finish, choice=choice)

    def _take(self, quantum: int) -> None:
        self._epoch = self._world.request.epoch
        choices = {stream.slot: i for i, stream in enumerate(self._world.request.streams)}
        emitted = {choices[c.slot]: len(c.emitted) // 4 for c in self._world.submissions[-1].choices}
        self._next = {choice: count + 1 for choice, count in emitted.items()}
        self._until = {choice: min(count + quantum, self._goal) + 1 for choice, count in emitted.items()}


ACTIONS = ["step", "step", "step", "step", "lose", "late", "left", "tick", "claim"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_token_arrives_once_in_order_through_any_yields_and_losses(data: st.DataObject) -> None:
    world = World(num_choices=2)
    worker = Worker(world, goal := 12)
    for _ in range(150):
        if not len(world.table):
            break
        action = data.draw(st.sampled_from(ACTIONS))
        if action in ("step", "lose"):
            choice, count = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3))
            worker.step(choice, count, data.draw(st.integers(1, 8)), is_lost=action == "lose")
        elif action == "late" and world.request.epoch:
            world.frame(0, [99], epoch=world.request.epoch - 1, finish=m.FINISH_YIELD)
        elif action == "left" and world.request.worker_deaths < MAX_WORKER_DEATHS - 1:
            world.table.on_left("worker", "w1", world.now)
        elif action == "tick":
            world.at(world.now + data.draw(st.floats(0.1, 4.0)))
        elif action == "claim":
            world.claim()
    for _ in range(40):
        # Nothing is lost any more.
        world.at(world.now + m.CLAIM_LEASE_S / 2)
        for choice in (0, 1):
            worker.step(choice, 3, 8, is_lost=False)
    assert not len(world.table)
    for received in world.reader.deltas.values():
        assert [int(token) for token in received] == list(range(1, len(received) + 1))
    if world.reader.ended:
        assert [len(received) for received in world.reader.deltas.values()] == [goal, goal]
    assert all(isinstance(error, Unavailable) for error in world.reader.errors)
    stats = world.table.stats
    assert world.request.epoch == stats.yielded + stats.recovered
    assert bool(world.request.message.yield_epoch) == bool(stats.yielded)
