"""What schedulers say of the number of workers, alone and together."""

from __future__ import annotations

import pytest

from scheduler_svc.policy.scale import ScaleLimits
from scheduler_svc.scaling import Scaling, check_scale
from scheduler_svc.state import ClusterState
from tests.support.scheduling import MODEL, make_events, make_maker, make_request, make_status
from weft.columns import pack_u32
from weft.errors import InvalidRequest, SettingsError
from weft.messages import Ended, Heartbeat, ScaleAdvice


def make_scaling(name: str = "s0", policy: str = "queue", **limits: float) -> Scaling:
    return Scaling(name, policy, ScaleLimits(**({"max_workers": 4, "idle_s": 5.0} | limits)), 1.0)  # type: ignore[arg-type]


def advise(scaling: Scaling, state: ClusterState, now: float = 0.0, *schedulers: str) -> ScaleAdvice:
    (advice,) = scaling.advise(state.demands(), schedulers or ("s0",), now)
    return advice


def test_a_model_without_workers_is_known_by_its_tokenizer() -> None:
    state = ClusterState("s0", make_maker())
    state.on_heartbeat(Heartbeat("tokenizer", "t0", 1, "ready", [MODEL]), 0.0)
    assert advise(make_scaling(), state) == ScaleAdvice("s0", MODEL, target=0, reason="nothing to do for 0 s")


def test_the_first_request_asks_for_a_worker_at_once() -> None:
    scaling, state = make_scaling(), ClusterState("s0", make_maker())
    request = make_request(num_tokens=32)
    state.on_request(request, 0.0)
    assert scaling.on_request(request)
    advice = advise(scaling, state)
    assert (advice.num_waiting, advice.num_waiting_tokens, advice.num_arrived, advice.target) == (1, 32, 1, 1)
    assert not scaling.on_request(make_request("r1"))


def test_only_the_lowest_of_the_schedulers_decides_and_counts_what_waits_with_the_others() -> None:
    low, high = make_scaling("s0"), make_scaling("s1")
    empty, full = ClusterState("s0", make_maker()), ClusterState("s1", make_maker())
    for state in (empty, full):
        state.on_heartbeat(Heartbeat("tokenizer", "t0", 1, "ready", [MODEL]), 0.0)
    assert advise(low, empty, 0.0, "s0", "s1").target == 0
    full.on_request(make_request(), 0.0)
    told = advise(high, full, 0.0, "s0", "s1")
    assert (told.target, told.num_waiting) == (None, 1)
    assert low.on_advice(told)
    assert advise(low, empty, 0.0, "s0", "s1").target == 1


def test_what_a_scheduler_said_that_has_gone_counts_no_more() -> None:
    scaling, state = make_scaling(idle_s=1.0), ClusterState("s0", make_maker())
    state.on_heartbeat(Heartbeat("tokenizer", "t0", 1, "ready", [MODEL]), 0.0)
    scaling.on_advice(ScaleAdvice("s1", MODEL, num_waiting=3))
    assert advise(scaling, state, 0.0, "s0", "s1").target == 1
    assert [advise(scaling, state, now, "s0").target for now in (0.5, 3.0)] == [1, 0]


def test_advice_to_have_fewer_names_the_worker_whose_blocks_others_have_first() -> None:
    scaling, state = make_scaling("s0", "fixed", min_workers=1, max_workers=1), ClusterState("s0", make_maker())
    for number in range(3):
        state.on_status(make_status(f"w{number}"), 0.0)
    state.on_kv(make_events(1, [1, 2, 3], holder="w0"), 0.0)
    state.on_kv(make_events(1, [1, 2], holder="w1"), 0.0)
    state.on_status(make_status("w2", num_running=1), 0.0)
    advice = advise(scaling, state)
    assert (advice.target, advice.drain) == (1, ["w1", "w0", "w2"])


def test_workers_that_start_and_drain_are_counted_as_such() -> None:
    state = ClusterState("s0", make_maker())
    state.on_status(make_status("w0"), 0.0)
    state.on_status(make_status("w1", state="draining"), 0.0)
    state.on_heartbeat(Heartbeat("worker", "w2", 1, "starting"), 0.0)
    state.on_heartbeat(Heartbeat("worker", "w3", 1, "starting", ["another"]), 0.0)
    (demand,) = state.demands()
    assert ([worker.name for worker in demand.ready], demand.num_starting) == (["w0"], 1)


def test_a_workers_pace_is_its_places_over_the_time_that_one_is_taken() -> None:
    scaling, state = make_scaling("s0", "predictive"), ClusterState("s0", make_maker())
    state.on_status(make_status("w0", num_running=2), 0.0)
    for second in range(20):
        scaling.on_ended(Ended("w0", MODEL, ["r"], [""], pack_u32([1]), pack_u32([1])))
        advice = advise(scaling, state, float(second))
    # Two of four places end one request a second.
    assert "a worker ends 2." in advice.reason


def test_a_policy_is_switched_while_running() -> None:
    scaling, state = make_scaling("s0", "queue", min_workers=1), ClusterState("s0", make_maker())
    state.on_status(make_status("w0"), 0.0)
    assert advise(scaling, state).target == 1
    scaling.switch("fixed")
    assert (scaling.policy_of(MODEL), advise(scaling, state).target) == ("fixed", 4)
    scaling.switch("slo", MODEL)
    assert (scaling.policy_of(MODEL), scaling.policy_of("another")) == ("slo", "fixed")


def test_slo_needs_a_promise_that_it_could_keep() -> None:
    with pytest.raises(SettingsError, match="scale: slo needs the promise of a first token .* --slo ttft=2"):
        Scaling("s0", "slo", ScaleLimits())
    with pytest.raises(InvalidRequest, match="slo needs the promise of a first token"):
        check_scale(Scaling("s0", "queue", ScaleLimits()), "slo")


def test_slo_keeps_the_promise_that_it_was_given() -> None:
    state = ClusterState("s0", make_maker())
    state.on_status(make_status("w0", num_waiting_tokens=3000, num_waiting=1, prefill_tokens_per_s=1000.0), 0.0)
    targets = [advise(Scaling("s0", "slo", ScaleLimits(0, 9), ttft_s), state).target for ttft_s in (6.0, 3.0, 1.5)]
    assert targets == [1, 2, 3]


def test_what_cannot_be_switched_to_is_said() -> None:
    check_scale(None, None)
    check_scale(make_scaling(), "slo")
    with pytest.raises(InvalidRequest, match="scaling is off"):
        check_scale(None, "slo")
    with pytest.raises(InvalidRequest, match="no scale policy 'often'; there are fixed, queue, slo, predictive"):
        check_scale(make_scaling(), "often")
