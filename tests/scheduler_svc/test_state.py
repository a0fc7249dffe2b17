"""What a scheduler decides on each event."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from scheduler_svc.actions import Action, Dispatch, Reject, WantSnapshot
from tests.support.scheduling import MODEL, SCHEDULER, make_events, make_maker, make_request, make_state, make_status
from weft.columns import pack_u32
from weft.errors import DecodeError, InvalidRequest, Overloaded, Unavailable
from weft.messages import Cancel, Declined, Ended, Heartbeat, Role, State
from weft.subjects import Returned


def told(actions: Iterable[Action]) -> list[tuple[str, ...]]:
    """Actions as short tuples."""
    found: list[tuple[str, ...]] = []
    for action in actions:
        match action:
            case Dispatch():
                found.append(("dispatch", action.request.request_id, action.decision.worker))
            case WantSnapshot():
                found.append(("snapshot", action.worker))
            case _:
                found.append((type(action).__name__.lower(), action.request.request_id))
    return found


def beat(role: Role, instance: str, *, epoch: int = 1, state: State = "ready") -> Heartbeat:
    return Heartbeat(role, instance, epoch, state)


def test_request_goes_on_at_once_when_there_is_room() -> None:
    state = make_state()
    state.on_status(make_status(), 0.0)
    assert told(state.on_request(make_request(), 0.1)) == [("dispatch", "r0", "w0")]


def test_request_without_a_worker_waits_and_goes_when_one_comes() -> None:
    state = make_state()
    assert told(state.on_request(make_request(), 0.0)) == [("queued", "r0")]
    assert told(state.on_status(make_status(state="starting"), 1.0)) == []
    assert told(state.on_status(make_status(model="other", worker="w1"), 1.0)) == []
    assert told(state.on_status(make_status(), 2.0)) == [("dispatch", "r0", "w0")]
    assert state.num_waiting == 0


def test_room_counts_what_is_on_its_way() -> None:
    state = make_state()
    state.on_status(make_status(max_num_seqs=2), 0.0)
    assert told(state.on_request(make_request("a"), 0.1)) == [("dispatch", "a", "w0")]
    # An old status does not know of it yet.
    state.on_status(make_status(max_num_seqs=2), 0.2)
    assert told(state.on_request(make_request("b"), 0.3)) == [("dispatch", "b", "w0")]
    assert told(state.on_request(make_request("c"), 0.4)) == [("queued", "c")]
    status = make_status(max_num_seqs=2, num_running=1, accepted={SCHEDULER: 2})
    assert told(state.on_status(status, 0.5)) == [("dispatch", "c", "w0")]


def test_what_a_former_life_of_the_scheduler_sent_is_not_counted() -> None:
    state = make_state()
    state.on_status(make_status(max_num_seqs=2, accepted={SCHEDULER: 500}), 0.0)
    for name in "abc":
        state.on_request(make_request(name), 0.1)
    assert state.num_in_flight == 2
    state.on_status(make_status(max_num_seqs=2, num_running=1, accepted={SCHEDULER: 501}), 0.2)
    assert state.num_in_flight == 1


def test_lost_assignment_gives_its_room_back_after_a_while() -> None:
    state = make_state()
    state.on_status(make_status(max_num_seqs=1), 0.0)
    state.on_request(make_request("a"), 0.0)
    state.on_request(make_request("b"), 0.0)
    assert told(state.on_status(make_status(max_num_seqs=1), 2.9)) == []
    assert told(state.on_status(make_status(max_num_seqs=1), 3.1)) == [("dispatch", "b", "w0")]
    assert state.num_lost == 1


def test_schedulers_share_the_room_of_workers() -> None:
    state = make_state()
    state.on_status(make_status(max_num_seqs=5), 0.0)
    state.on_heartbeat(beat("scheduler", "s1"), 0.0)
    actions = [action for name in "abcd" for action in state.on_request(make_request(name), 0.1)]
    assert [name for name, *_ in told(actions)] == ["dispatch"] * 3 + ["queued"]
    assert told(state.on_heartbeat(beat("scheduler", "s1", state="dead"), 0.2)) == [("dispatch", "d", "w0")]


def test_all_choices_of_a_request_go_to_one_worker_with_room_for_them() -> None:
    state = make_state()
    state.on_status(make_status("w0", num_running=2), 0.0)
    state.on_status(make_status("w1", num_running=1), 0.0)
    assert told(state.on_request(make_request("big", num_choices=3), 0.1)) == [("dispatch", "big", "w1")]
    assert told(state.on_request(make_request("next", num_choices=3), 0.1)) == [("queued", "next")]


def test_request_larger_than_its_share_is_not_starved() -> None:
    state = make_state()
    state.on_heartbeat(beat("scheduler", "s1"), 0.0)
    state.on_status(make_status(num_running=2), 0.0)
    assert told(state.on_request(make_request("big", num_choices=4), 0.1)) == [("queued", "big")]
    assert told(state.on_status(make_status(), 0.2)) == [("dispatch", "big", "w0")]


def test_request_with_more_choices_than_any_worker_holds_is_rejected() -> None:
    state = make_state()
    waiting = make_request("early", num_choices=5)
    assert told(state.on_request(waiting, 0.0)) == [("queued", "early")]
    assert told(state.on_status(make_status(), 0.1)) == [("reject", "early")]
    (action,) = state.on_request(make_request("late", num_choices=5), 0.2)
    assert isinstance(action, Reject) and isinstance(action.error, InvalidRequest) and action.error.param == "n"


def test_declined_request_goes_first_again_and_the_worker_rests_until_its_next_status() -> None:
    state = make_state()
    state.on_status(make_status(), 0.0)
    first = make_request("a")
    state.on_request(first, 0.1)
    assert told(state.on_declined(Declined(first, "w0"), 0.2)) == [("queued", "a")]
    assert told(state.on_request(make_request("b"), 0.3)) == [("queued", "b")]
    assert told(state.on_status(make_status(), 0.4)) == [("dispatch", "a", "w0"), ("dispatch", "b", "w0")]


def test_declined_request_goes_to_another_worker_at_once() -> None:
    state = make_state()
    state.on_status(make_status("w0"), 0.0)
    request = make_request("a")
    state.on_request(request, 0.1)
    state.on_status(make_status("w1", num_running=3), 0.1)
    assert told(state.on_declined(Declined(request, "w0"), 0.2)) == [("dispatch", "a", "w1")]


def test_returned_assignment_means_a_dead_worker_and_another_try() -> None:
    state = make_state()
    state.on_status(make_status("w0"), 0.0)
    request = make_request("a")
    state.on_request(request, 0.1)
    state.on_status(make_status("w1"), 0.1)
    actions = state.on_returned(Returned("g0", "a", 0), Unavailable("nobody"), 0.2)
    assert told(actions) == [("dispatch", "a", "w1")]
    assert told(state.on_request(make_request("b"), 0.3)) == [("dispatch", "b", "w1")]


def test_assignment_that_the_worker_cannot_read_is_handed_on() -> None:
    state = make_state()
    state.on_status(make_status(), 0.0)
    state.on_request(make_request("a"), 0.1)
    assert told(state.on_returned(Returned("g0", "a", 0), DecodeError("what?"), 0.2)) == [("lost", "a")]
    assert told(state.on_returned(Returned("g0", "a", 0), DecodeError("what?"), 0.2)) == []


def test_what_was_on_its_way_to_a_worker_that_leaves_is_the_gateways_to_recover() -> None:
    state = make_state()
    state.on_heartbeat(beat("worker", "w0"), 0.0)
    state.on_status(make_status(num_running=1, accepted={SCHEDULER: 1}), 0.0)
    state.on_request(make_request("a"), 0.1)
    assert told(state.on_heartbeat(beat("worker", "w0", state="dead"), 0.2)) == [("lost", "a")]
    assert told(state.on_request(make_request("a", epoch=1), 0.3)) == [("queued", "a")]
    # A new life has room and blocks of its own.
    assert told(state.on_status(make_status(worker_epoch=2), 0.4)) == [("dispatch", "a", "w0")]
    assert told(state.on_status(make_status(), 0.5)) == []


def test_only_the_assignment_that_came_back_is_known_not_to_run() -> None:
    state = make_state()
    state.on_status(make_status("w0"), 0.0)
    for name in "ab":
        state.on_request(make_request(name), 0.1)
    actions = state.on_returned(Returned("g0", "b", 0), Unavailable("nobody"), 0.2)
    assert told(actions) == [("lost", "a"), ("queued", "b")]


def test_worker_of_which_nobody_hears_is_gone_but_not_while_its_heart_beats() -> None:
    state = make_state()
    state.on_heartbeat(beat("gateway", "g0"), 1.5)
    state.on_heartbeat(beat("worker", "w1"), 1.5)
    state.on_status(make_status("w0"), 0.0)
    state.on_status(make_status("w1"), 0.0)
    state.on_tick(1.6)
    assert state.stats()["workers"] == 1
    state.on_tick(3.1)
    assert state.stats()["workers"] == 0


def test_silence_proves_nothing_after_being_cut_off() -> None:
    state = make_state()
    state.on_heartbeat(beat("worker", "w0"), 0.0)
    state.on_status(make_status(), 0.0)
    state.forgive(100.0)
    state.on_tick(100.1)
    assert state.stats()["workers"] == 1


def test_cancel_drops_a_waiting_request() -> None:
    state = make_state()
    state.on_request(make_request("a"), 0.0)
    assert told(state.on_cancel(Cancel("a", 0, "g0"), 0.1)) == [("dropped", "a")]
    assert told(state.on_status(make_status(), 0.2)) == []


def test_cancel_that_comes_before_its_request_is_remembered() -> None:
    state = make_state()
    state.on_status(make_status(), 0.0)
    assert told(state.on_cancel(Cancel("a", 1, "g0"), 0.1)) == []
    assert told(state.on_request(make_request("a", epoch=1), 0.2)) == [("dropped", "a")]
    assert told(state.on_request(make_request("a", epoch=2), 0.3)) == [("dispatch", "a", "w0")]


def test_cancel_of_some_choices_leaves_the_others() -> None:
    state = make_state()
    state.on_request(make_request("a", num_choices=3), 0.0)
    assert told(state.on_cancel(Cancel("a", 0, "g0", pack_u32([0, 2])), 0.1)) == []
    (action,) = state.on_status(make_status(), 0.2)
    assert isinstance(action, Dispatch)
    assert [choice.slot for choice in action.request.choices] == [1]
    state.on_request(make_request("b", num_choices=4), 0.3)
    assert told(state.on_cancel(Cancel("b", 0, "g0", pack_u32([0, 1, 2, 3])), 0.4)) == [("dropped", "b")]


def test_cancelled_request_is_not_put_back() -> None:
    state = make_state()
    state.on_status(make_status(), 0.0)
    request = make_request("a")
    state.on_request(request, 0.1)
    state.on_cancel(Cancel("a", 0, "g0"), 0.2)
    assert told(state.on_declined(Declined(request, "w0"), 0.3)) == [("dropped", "a")]


@pytest.mark.parametrize(
    ("count", "first"), [([7], "ann's"), ([], "bob's")], ids=["found a stop string", "nobody reads it"]
)
def test_a_choice_that_ends_by_a_stop_string_is_charged_what_it_generated(count: list[int], first: str) -> None:
    state = make_state(order="fair")
    state.on_status(make_status(max_num_seqs=2), 0.0)
    for request_id, tenant in (("a", "ann"), ("b", "bob"), ("bob's", "bob"), ("ann's", "ann")):
        state.on_request(make_request(request_id, tenant=tenant), 0.1)
    state.on_cancel(Cancel("a", 0, "g0", num_output_tokens=pack_u32(count)), 0.2)
    state.on_ended(Ended("w0", "tales", ["a"] * len(count), ["ann"] * len(count), pack_u32(count), pack_u32(count)))
    assert state.stats()["predictions_total"] == len(count)
    status = make_status(max_num_seqs=2, num_running=1, accepted={SCHEDULER: 2})
    assert told(state.on_status(status, 0.3)) == [("dispatch", first, "w0")]


def test_higher_epoch_replaces_a_lower_one() -> None:
    state = make_state()
    state.on_request(make_request("a", epoch=1), 0.0)
    assert told(state.on_request(make_request("a", epoch=2), 0.1)) == [("dropped", "a"), ("queued", "a")]
    assert told(state.on_request(make_request("a", epoch=1), 0.2)) == [("dropped", "a")]
    assert told(state.on_request(make_request("a", epoch=2), 0.3)) == [("dropped", "a")]
    assert [request.epoch for request in state.waiting()] == [2]


def test_stream_that_had_begun_goes_before_new_requests_and_past_admission() -> None:
    state = make_state(make_maker(1, 100), admit="bounded")
    state.on_request(make_request("new"), 0.0)
    (refused,) = state.on_request(make_request("newer"), 0.1)
    assert isinstance(refused, Reject) and isinstance(refused.error, Overloaded)
    assert told(state.on_request(make_request("begun", epoch=1), 0.2)) == [("queued", "begun")]
    actions = state.on_status(make_status(max_num_seqs=1), 0.3)
    assert told(actions) == [("dispatch", "begun", "w0")]


def test_admission_is_not_asked_while_there_is_room() -> None:
    state = make_state(make_maker(1, 1), admit="bounded")
    state.on_status(make_status(), 0.0)
    assert told(state.on_request(make_request("a", num_tokens=500), 0.1)) == [("dispatch", "a", "w0")]


def test_gateway_that_leaves_takes_its_requests_along() -> None:
    state = make_state()
    state.on_heartbeat(beat("gateway", "g0"), 0.0)
    state.on_heartbeat(beat("gateway", "g1"), 0.0)
    state.on_status(make_status(max_num_seqs=1), 0.0)
    sent = make_request("sent")
    state.on_request(sent, 0.1)
    state.on_request(make_request("a"), 0.1)
    state.on_request(make_request("b", gateway="g1"), 0.1)
    assert told(state.on_heartbeat(beat("gateway", "g0", state="dead"), 0.2)) == [("dropped", "a")]
    assert told(state.on_declined(Declined(sent, "w0"), 0.3)) == [("dropped", "sent")]
    assert told(state.on_status(make_status(), 0.4)) == [("dispatch", "b", "w0")]


def test_gateway_that_never_was_heard_of_is_given_some_time() -> None:
    state = make_state()
    state.on_request(make_request("a"), 0.0)
    state.on_tick(0.5)
    assert told(state.on_tick(3.4)) == []
    assert told(state.on_tick(3.6)) == [("dropped", "a")]


def test_drain_hands_everything_on() -> None:
    state = make_state()
    state.on_status(make_status(max_num_seqs=1), 0.0)
    sent = make_request("sent")
    state.on_request(sent, 0.0)
    state.on_request(make_request("a"), 0.0)
    assert told(state.drain()) == [("lost", "a")]
    assert told(state.on_request(make_request("b"), 0.1)) == [("lost", "b")]
    assert told(state.on_declined(Declined(sent, "w0"), 0.2)) == [("lost", "sent")]
    assert told(state.on_status(make_status(), 0.3)) == []


def test_head_that_does_not_fit_holds_back_later_requests_of_its_model_only() -> None:
    state = make_state()
    state.on_status(make_status(num_running=2), 0.0)
    state.on_status(make_status("w1", model="other"), 0.0)
    assert told(state.on_request(make_request("big", num_choices=3), 0.1)) == [("queued", "big")]
    assert told(state.on_request(make_request("small"), 0.2)) == [("queued", "small")]
    assert told(state.on_request(make_request("else", model="other"), 0.3)) == [("dispatch", "else", "w1")]
    actions = state.on_status(make_status(), 0.4)
    assert told(actions) == [("dispatch", "big", "w0"), ("dispatch", "small", "w0")]


def test_request_follows_its_prefix_and_the_decision_says_why() -> None:
    state = make_state(route="prefix_aware")
    for worker in ("w0", "w1", "w2"):
        state.on_status(make_status(worker), 0.0)
    state.on_kv(make_events(1, [1, 2, 3, 4], holder="w1"), 0.1)
    state.on_kv(make_events(1, [1], holder="w2"), 0.1)
    (action,) = state.on_request(make_request("a", blocks=[1, 2, 3, 9]), 0.2)
    assert isinstance(action, Dispatch)
    decision = action.decision
    assert (decision.worker, decision.policy, decision.rule) == ("w1", "prefix_aware", "longest match")
    assert (decision.num_candidates, decision.num_prompt_blocks) == (3, 4)
    assert {score.worker: score.matched_blocks for score in decision.scores} == {"w0": 0, "w1": 3, "w2": 1}


def test_min_ttft_counts_on_the_store_as_long_as_workers_say_how_fast_it_is() -> None:
    state = make_state(route="min_ttft")
    state.on_status(make_status("w1", num_waiting_tokens=500), 0.0)
    state.on_kv(make_events(1, range(10), holder="w1"), 0.0)

    def rule_when(number: int, **status: float) -> tuple[str, str]:
        state.on_status(make_status("w0", prefill_tokens_per_s=1000.0, accepted={SCHEDULER: number}, **status), 0.1)
        (action,) = state.on_request(make_request(f"r{number}", blocks=range(10)), 0.1)
        assert isinstance(action, Dispatch)
        return action.decision.worker, action.decision.rule

    assert rule_when(0) == ("w0", "compute"), "nobody has loaded anything"
    assert rule_when(1, block_load_s=0.001) == ("w0", "fetch")
    assert rule_when(2, block_load_s=1.0) == ("w0", "compute"), "computing is faster"
    assert rule_when(3, block_load_s=0.0) == ("w0", "compute"), "there is no store any more"


def test_missed_events_are_asked_for_once() -> None:
    state = make_state(route="prefix_aware")
    assert told(state.on_status(make_status(kv_sequence=7), 0.0)) == [("snapshot", "w0")]
    assert told(state.on_kv(make_events(8, [5]), 0.1)) == []
    assert told(state.on_kv(make_events(7, [1, 2], snapshot=True), 0.2)) == []
    assert told(state.on_kv(make_events(10, [6]), 0.3)) == [("snapshot", "w0")]
    assert told(state.on_status(make_status(kv_sequence=10), 0.5)) == []
    # Nobody answered.
    assert told(state.on_status(make_status(kv_sequence=10), 2.5)) == [("snapshot", "w0")]


@pytest.mark.parametrize("model", [MODEL, "never served"])
def test_models_are_those_of_ready_workers(model: str) -> None:
    state = make_state()
    state.on_status(make_status(model=model, state="starting"), 0.0)
    assert state.models() == []
    state.on_status(make_status(model=model), 0.1)
    assert state.models() == [model]


def test_request_that_is_put_back_keeps_its_place() -> None:
    state = make_state()
    requests = [make_request(name) for name in "zyx"]
    for request in requests:
        state.on_request(request, 0.0)
    assert told(state.on_status(make_status(max_num_seqs=1), 0.1)) == [("dispatch", "z", "w0")]
    state.on_declined(Declined(requests[0], "w0"), 0.2)
    actions = state.on_status(make_status(), 0.3)
    assert [name for _, name, _ in told(actions)] == ["z", "y", "x"]
