"""The request table: each token once and in order, whatever is lost, repeated or late."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.streams import MAX_WORKER_DEATHS, PROGRESS_TOKENS
from tests.support.request_table import PlainAssembler, Reader, World
from weft import messages as m
from weft.columns import pack_u32, unpack_u32
from weft.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, WorkerLost


def test_tokens_reach_their_reader_and_the_end_ends_the_request() -> None:
    world = World()
    world.frame(0, [1])
    world.frame(1, [2, 3], finish=m.FINISH_LENGTH)
    assert world.reader.deltas == {0: ["1", "2", "3"]}
    assert (world.reader.ended, len(world.table), world.cancels) == (1, 0, [])


def test_repeated_tokens_and_old_epochs_are_dropped() -> None:
    world = World()
    world.frame(0, [1, 2])
    world.frame(1, [2, 3])
    world.event("lost")
    world.frame(3, [9], epoch=0)
    world.frame(3, [4])
    assert world.reader.deltas == {0: ["1", "2", "3", "4"]}
    assert world.table.stats.repeated_tokens == 1
    assert world.table.stats.stale_rows == 1


def test_a_missing_token_starts_a_recovery_with_what_is_there() -> None:
    world = World()
    world.frame(0, [1, 2])
    world.frame(3, [4])
    again = world.submissions[-1]
    assert (again.epoch, unpack_u32(again.choices[0].emitted), again.choices[0].seed) == (1, [1, 2], 100)
    assert world.cancels[-1] == m.Cancel("r1", 0, "g1")
    world.frame(2, [3, 4], finish=m.FINISH_LENGTH)
    assert world.reader.deltas == {0: ["1", "2", "3", "4"]}


def test_only_unfinished_choices_are_recovered() -> None:
    world = World(num_choices=3)
    world.frame(0, [1], choice=0)
    world.frame(0, [7], choice=1, finish=m.FINISH_LENGTH)
    world.event("lost")
    assert [choice.slot for choice in world.submissions[-1].choices] == [0, 2]


def test_a_stop_string_cancels_its_choice_at_the_worker() -> None:
    world = World(num_choices=2)
    world.frame(0, [5, 0], choice=0)
    assert world.cancels == [m.Cancel("r1", 0, "g1", pack_u32([0]), pack_u32([2]))]
    world.frame(0, [5, 6, 0], choice=1)
    assert world.cancels[-1] == m.Cancel("r1", 0, "g1", num_output_tokens=pack_u32([3]))
    assert world.reader.ended == 1


@pytest.mark.parametrize("role", ["tokenizer", "scheduler", "worker"])
def test_a_holder_that_leaves_starts_a_recovery_at_once(role: m.Role) -> None:
    world = World()
    world.claim(role, "x1")
    world.table.on_left(role, "other", 0.1)
    assert len(world.submissions) == 1
    world.table.on_left(role, "x1", 0.1)
    assert world.submissions[-1].epoch == 1


def test_whoever_may_have_held_an_unclaimed_request_is_not_waited_for() -> None:
    world = World()
    world.table.on_left("tokenizer", "t1", 0.1)
    assert world.submissions[-1].epoch == 1
    world.table.on_left("cache", "c1", 0.1)
    assert len(world.submissions) == 2


def test_a_claimed_request_waits_for_ever_and_an_unclaimed_one_is_recovered() -> None:
    world = World()
    for second in range(100):
        world.at(float(second)).claim("scheduler", "s1")
    assert len(world.submissions) == 1
    world.at(99.0 + m.CLAIM_LEASE_S + 0.1)
    assert world.submissions[-1].epoch == 1
    assert world.table.stats.expired_leases == 1


def test_silence_while_the_bus_was_away_proves_nothing() -> None:
    world = World()
    world.frame(0, [1])
    world.table.on_reconnect(100.0)
    world.at(100.1)
    assert len(world.submissions) == 1


def test_after_lost_frames_what_the_worker_no_longer_claims_is_recovered_soon() -> None:
    world = World()
    world.frame(0, [1], sequence=0)
    other = m.GenerateRequest("r2", 0, "g1", "m", m.TextPrompt("hi"), m.SamplingParams(), [])
    world.table.add(other, Reader(), [(0, 1, PlainAssembler())], 0.0)  # type: ignore[list-item]
    for request_id in ("r1", "r2"):
        world.table.on_claims(m.Claims("worker", "w1", [request_id], pack_u32([0])), 0.0)
    world.frame(1, [2], sequence=5)
    assert world.table.stats.frame_gaps == 1
    world.at(1.5)
    # The stream that the next frame carried has lost nothing.
    assert [request.request_id for request in world.submissions[2:]] == ["r2"]


def test_a_missing_role_is_waited_for_and_then_is_a_503() -> None:
    world = World(wait_for_role_s=5.0)
    absent = Unavailable("nobody listens")
    for step in range(1000):
        world.at(step * 0.1)
        if not len(world.table):
            break
        if world.request.submit_at is None:
            world.table.on_returned("r1", world.request.epoch, absent, world.now)
    assert isinstance(world.reader.errors[0], Unavailable)
    assert 5.0 <= world.now < 7.0
    assert 6 <= len(world.submissions) < 30


def test_a_role_that_comes_back_ends_the_wait() -> None:
    world = World()
    for _ in range(4):
        world.at(world.now + 1.0)
        world.table.on_returned("r1", world.request.epoch, Unavailable("nobody"), world.now)
    world.at(world.request.submit_at - 0.3)  # type: ignore[operator]
    count = len(world.submissions)
    world.table.on_joined(world.now)
    world.at(world.now + 0.1)
    assert len(world.submissions) == count + 1


def test_a_rejection_fails_the_request_with_its_error() -> None:
    world = World()
    world.event("rejected", "tokenizer", "t1", InvalidRequest("too long", param="messages"))
    assert (world.reader.errors[0].param, len(world.table)) == ("messages", 0)


def test_a_full_scheduler_rejects_new_requests_but_not_recovered_ones() -> None:
    world = World()
    world.event("rejected", "scheduler", "s1", Overloaded("full"))
    assert isinstance(world.reader.errors[0], Overloaded)
    world = World()
    world.frame(0, [1])
    world.event("lost")
    world.event("rejected", "scheduler", "s1", Overloaded("full"))
    assert not world.reader.errors
    world.at(1.0)
    assert world.submissions[-1].epoch == 2


def test_a_request_that_takes_its_workers_with_it_fails() -> None:
    world = World()
    for death in range(MAX_WORKER_DEATHS):
        world.event("started", instance=f"w{death}")
        world.table.on_left("worker", f"w{death}", world.now)
        world.at(world.now + 1.0)
    assert isinstance(world.reader.errors[0], WorkerLost)
    assert len(world.submissions) == MAX_WORKER_DEATHS


def test_a_request_that_ends_its_workers_before_they_can_claim_it_fails() -> None:
    world = World()
    for death in range(MAX_WORKER_DEATHS):
        assert not world.reader.errors
        world.table.on_left("worker", f"w{death}", world.now)
        world.at(world.now + 2.0)
    assert isinstance(world.reader.errors[0], WorkerLost)


def test_a_request_that_goes_on_between_the_deaths_of_its_workers_is_not_their_cause() -> None:
    world = World()
    for death in range(3 * MAX_WORKER_DEATHS):
        start = death * PROGRESS_TOKENS
        world.frame(start, [7] * PROGRESS_TOKENS, worker=f"w{death}")
        world.table.on_left("worker", f"w{death}", world.now)
        world.at(world.now + 1.0)
    assert not world.reader.errors
    for death in range(MAX_WORKER_DEATHS - 1):
        # A token a life is none that counts.
        world.frame(start + PROGRESS_TOKENS + death, [7], worker=f"v{death}", sequence=0)
        world.table.on_left("worker", f"v{death}", world.now)
        world.at(world.now + 1.0)
    assert isinstance(world.reader.errors[0], WorkerLost)


def test_a_recovered_request_without_tokens_fails_after_the_stall_limit() -> None:
    world = World()
    world.event("lost")
    for second in range(100):
        world.at(float(second)).claim()
    assert isinstance(world.reader.errors[0], DeadlineExceeded)


def test_a_worker_that_hands_a_request_back_again_and_again_is_not_asked_without_end() -> None:
    world = World()
    for step in range(2000):
        world.at(step * 0.05)
        if not len(world.table):
            break
        if world.request.submit_at is None:
            world.event("started")
            world.event("lost")
    assert isinstance(world.reader.errors[0], Unavailable | DeadlineExceeded)
    assert len(world.submissions) < 100


def test_a_claim_to_a_request_that_ended_is_cancelled_again() -> None:
    world = World()
    world.frame(0, [1], finish=m.FINISH_LENGTH)
    world.claim()
    assert world.cancels == [m.Cancel("r1", 0, "g1")]


def test_a_scheduler_does_not_hold_a_request_for_ever_while_no_worker_comes() -> None:
    world = World(wait_for_role_s=5.0)
    for second in range(1, 20):
        world.at(float(second), missing="worker").claim("scheduler", "s1")
    assert world.reader.errors[0].message == "no worker is there"
    assert len(world.submissions) == 1


def test_a_role_that_was_missing_for_long_is_waited_for_by_a_request_that_is_new() -> None:
    world = World(wait_for_role_s=5.0)
    world.table.drop(world.request)
    for second in range(100):
        world.at(float(second), missing="worker")
    message = m.GenerateRequest("r2", 0, "g1", "m", m.TextPrompt("hi"), m.SamplingParams(), [])
    world.table.add(message, world.reader, [(0, 1, PlainAssembler())], world.now)  # type: ignore[list-item]
    world.at(103.0, missing="worker")
    assert (len(world.table), world.reader.errors) == (1, [])
    world.at(105.0, missing="worker")
    assert world.reader.errors[0].message == "no worker is there"


def test_the_requests_of_a_dead_worker_go_elsewhere_a_few_at_a_time() -> None:
    world = World()
    for number in range(99):
        message = m.GenerateRequest(f"more-{number}", 0, "g1", "m", m.TextPrompt("hi"), m.SamplingParams(), [])
        world.table.add(message, world.reader, [(0, 1, PlainAssembler())], 0.0)  # type: ignore[list-item]
    world.table.on_left("worker", "w1", 0.0)
    assert len(world.submissions) == 100 + 32
    world.at(1.0)
    assert len(world.submissions) == 200


def test_all_requests_can_be_ended_with_an_error() -> None:
    world = World()
    world.table.fail_all(Unavailable("shutting down"))
    assert (len(world.reader.errors), len(world.table), len(world.cancels)) == (1, 0, 1)


def test_a_failed_choice_fails_the_request_with_the_workers_error() -> None:
    world = World()
    world.frame(0, [1])
    world.frame(1, [], finish=m.FINISH_ERROR, error=m.ErrorInfo("internal_error", "NaN in the logits"))
    assert world.reader.errors[0].message == "NaN in the logits"


def test_a_reader_that_left_is_told_to_the_ring_once() -> None:
    world = World()
    world.frame(0, [1])
    world.table.drop(world.request)
    world.table.drop(world.request)
    assert world.cancels == [m.Cancel("r1", 0, "g1")]
    world.frame(1, [2])
    assert world.reader.deltas == {0: ["1"]}


def test_started_counts_the_cached_tokens_of_the_first_epoch() -> None:
    world = World()
    world.event("started")
    assert (world.request.num_prompt_tokens, world.request.num_cached_tokens) == (5, 3)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_token_arrives_once_in_order_whatever_happens(data: st.DataObject) -> None:
    """A worker that generates 1, 2, 3 … behind a network that loses, repeats and delays."""
    world = World()
    goal = 16
    next_token = {0: 1}
    for _ in range(120):
        if world.reader.ended:
            break
        epoch = world.request.epoch
        if epoch not in next_token:
            emitted = unpack_u32(world.submissions[-1].choices[0].emitted)
            next_token[epoch] = len(emitted) + 1
        action = data.draw(st.sampled_from(["step", "step", "step", "lose", "repeat", "late", "left", "tick", "claim"]))
        first = next_token[epoch]
        if action in ("step", "lose"):
            count = min(data.draw(st.integers(1, 4)), goal - first + 1)
            tokens = list(range(first, first + count))
            next_token[epoch] = first + count
            finish = m.FINISH_LENGTH if first + count > goal else m.FINISH_NONE
            if action == "step" and count > 0:
                world.frame(first - 1, tokens, finish=finish)
            else:
                world.sequence += 1
        elif action == "repeat" and first > 1:
            world.frame(first - 2, [first - 1], sequence=world.sequence)
        elif action == "late" and epoch:
            world.frame(0, [99], epoch=epoch - 1)
        elif action == "left" and world.request.worker_deaths < MAX_WORKER_DEATHS - 1:
            world.table.on_left("worker", "w1", world.now)
        elif action == "tick":
            world.at(world.now + data.draw(st.floats(0.1, 4.0)))
        elif action == "claim" and first <= goal:
            world.claim()
    received = [int(token) for token in world.reader.deltas.get(0, [])]
    assert received == list(range(1, len(received) + 1))
    assert not world.reader.errors or isinstance(world.reader.errors[0], Unavailable)
    assert world.reader.ended <= 1
