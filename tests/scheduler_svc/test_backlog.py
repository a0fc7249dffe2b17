"""The backlog's sums."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.backlog import Backlog
from scheduler_svc.policy.admit import new_tokens
from scheduler_svc.policy.order import Fcfs, Waiting
from tests.support.scheduling import make_request

steps = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50), st.integers(0, 2)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_sums_are_those_of_what_waits(plan: list[tuple[int, int, int]]) -> None:
    backlog = Backlog(Fcfs)
    for ticket, (number, num_tokens, model) in enumerate(plan):
        if backlog.get(f"r{number}") is not None:
            backlog.remove(f"r{number}")
        else:
            request = make_request(f"r{number}", num_tokens=num_tokens, model=f"m{model}", max_tokens=num_tokens)
            backlog.add(Waiting(request, ticket, 0.0), 0.0)
        waiting = [waiting.request for waiting in backlog]
        assert len(backlog) == len(waiting)
        assert set(backlog.models()) == {request.model for request in waiting}
        for model in ("m0", "m1", "m2"):
            own = [request for request in waiting if request.model == model]
            assert backlog.count(model) == len(own)
            assert backlog.num_tokens(model) == sum(request.num_tokens for request in own)
            assert backlog.num_new_tokens(model) == sum(map(new_tokens, own))
