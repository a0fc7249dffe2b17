"""The backlog's sums."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.backlog import Backlog
from scheduler_svc.policy.order import Fcfs, Sjf, Waiting
from tests.support.scheduling import make_request

steps = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50), st.integers(0, 2)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_sums_are_those_of_what_waits(plan: list[tuple[int, int, int]]) -> None:
    backlog = Backlog(lambda model: Fcfs())
    for ticket, (number, num_tokens, model) in enumerate(plan):
        if backlog.get(f"r{number}") is not None:
            backlog.remove(f"r{number}")
        else:
            request = make_request(f"r{number}", num_tokens=num_tokens, model=f"m{model}", max_tokens=num_tokens)
            backlog.add(Waiting(request, ticket, 0.0, remaining=num_tokens), 0.0)
        waiting = list(backlog)
        assert len(backlog) == len(waiting)
        assert set(backlog.models()) == {one.request.model for one in waiting}
        for model in ("m0", "m1", "m2"):
            own = [one for one in waiting if one.request.model == model]
            assert backlog.count(model) == len(own)
            assert backlog.num_tokens(model) == sum(one.request.num_tokens for one in own)
            assert backlog.num_new_tokens(model) == sum(one.remaining for one in own)


def test_reordered_queue_holds_the_same_in_the_new_order() -> None:
    orders: list[type[Fcfs] | type[Sjf]] = [Fcfs]
    backlog = Backlog(lambda model: orders[-1]())
    for ticket, num_tokens in enumerate((30, 10, 20)):
        request = make_request(f"r{ticket}", num_tokens=num_tokens, model="m0")
        backlog.add(Waiting(request, ticket, 0.0, remaining=1.0), 0.0)
    before = backlog.num_tokens("m0"), backlog.num_new_tokens("m0")
    orders.append(Sjf)
    backlog.reorder("m0", 0.0)
    assert (backlog.num_tokens("m0"), backlog.num_new_tokens("m0")) == before
    head = backlog.head("m0", 0.0)
    assert head is not None and head.request.request_id == "r1" and backlog.order("m0").name == "sjf"
