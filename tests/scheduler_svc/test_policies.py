"""Names of policies: settings, registries and switching agree."""

from __future__ import annotations

import pytest

from scheduler_svc.actions import Dispatch
from scheduler_svc.policies import CHOICES, PolicyNames
from tests.support.scheduling import make_events, make_maker, make_request, make_state, make_status
from weft.columns import pack_u32
from weft.errors import InvalidRequest
from weft.messages import Ended
from weft.settings import SchedulerSettings, declared


def test_settings_name_the_policies_there_are() -> None:
    choices = {
        item.name: set(item.metadata["choices"]) for item in declared(SchedulerSettings) if "choices" in item.metadata
    }
    for family, names in CHOICES.items():
        assert choices[family] == set(names)
    defaults = {item.name: item.default for item in declared(SchedulerSettings)}
    assert all(defaults[family] == getattr(PolicyNames(), family) for family in CHOICES)


@pytest.mark.parametrize("family", CHOICES)
def test_every_name_makes_a_policy_of_that_name(family: str) -> None:
    maker = make_maker()
    for name in CHOICES[family]:
        names = PolicyNames().with_changes({family: name})
        made = maker.order(names) if family == "order" else getattr(maker.make(names), family)
        assert made.name == name


def test_unknown_family_or_name_is_refused_and_changes_nothing() -> None:
    state = make_state()
    with pytest.raises(InvalidRequest, match="no policy family 'colour' of schedulers; there are admit, order"):
        state.set_policies({"order": "srpt", "colour": "red"}, None, 0.0)
    with pytest.raises(InvalidRequest, match="no order policy 'lifo'; there are fcfs, priority"):
        state.set_policies({"order": "lifo"}, "tales", 0.0)
    assert state.policy_names("tales").order == "fcfs"


def test_switching_orders_what_waits_anew() -> None:
    state = make_state()
    for request_id, size in (("long", 900), ("short", 9)):
        state.on_request(make_request(request_id, num_tokens=size), 0.0)
    assert state.set_policies({"order": "sjf"}, "tales", 0.0) == []
    actions = state.on_status(make_status(max_num_seqs=1), 0.0)
    assert [action.request.request_id for action in actions if isinstance(action, Dispatch)] == ["short"]
    assert (state.policy_names("tales").order, state.policy_names("other").order) == ("sjf", "fcfs")


def test_switching_keeps_what_predictions_have_learnt() -> None:
    state = make_state(order="srpt")
    state.on_status(make_status(), 0.0)
    ended = Ended("w0", "tales", ["x"] * 20, ["t"] * 20, pack_u32([100] * 20), pack_u32([7] * 20))
    state.on_ended(ended)
    state.set_policies({"route": "round_robin"}, None, 0.0)
    assert state.stats()["predictions_total"] == 20
    state.set_policies({"predict": "mean"}, None, 0.0)
    assert state.stats()["predictions_total"] == 0


def test_what_predictions_have_learnt_outlives_the_last_worker() -> None:
    state = make_state(order="srpt")
    state.on_status(make_status(), 0.0)
    prompts, outputs = [300] * 20 + [100] * 20, [7] * 20 + [400] * 20
    state.on_ended(Ended("w0", "tales", ["x"] * 40, ["t"] * 40, pack_u32(prompts), pack_u32(outputs)))
    state.on_status(make_status(state="dead"), 1.0)
    assert state.stats()["predictions_total"] == 40
    for request_id, num_tokens in (("long", 100), ("short", 300)):
        state.on_request(make_request(request_id, num_tokens=num_tokens, tenant="t"), 2.0)
    (action,) = state.on_status(make_status("w1", max_num_seqs=1), 3.0)
    assert isinstance(action, Dispatch) and action.request.request_id == "short"


def test_srpt_knows_what_is_cached() -> None:
    state = make_state(order="srpt", route="prefix_aware")
    state.on_status(make_status(max_num_seqs=1, num_running=1), 0.0)
    state.on_kv(make_events(1, range(50)), 0.0)
    state.on_request(make_request("plain", num_tokens=400, max_tokens=10), 0.0)
    state.on_request(make_request("cached", blocks=range(50), max_tokens=10), 0.0)
    (action,) = state.on_status(make_status(max_num_seqs=1, kv_sequence=1), 0.0)
    assert isinstance(action, Dispatch) and action.request.request_id == "cached"
