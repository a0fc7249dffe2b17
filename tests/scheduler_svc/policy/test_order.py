"""Orders: one test for each sentence of a policy's docstring, and what all have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.policy.order import (
    AGEING_S,
    AGEING_TOKENS,
    FIRST_QUANTUM,
    NUM_LEVELS,
    ORDERS,
    OUTPUT_WEIGHT,
    PROMPT_WORK,
    STARVATION_S,
    Edf,
    Fair,
    Fcfs,
    Mlfq,
    OrderPolicy,
    PrefixFirst,
    Priority,
    Sjf,
    Srpt,
    Waiting,
)
from tests.support.scheduling import make_request
from weft.columns import pack_u32
from weft.messages import Choice, TokenizedRequest


def generated(
    request_id: str, num_tokens: int, num_generated: int = 0, epoch: int = 0, yields: int = 0
) -> TokenizedRequest:
    """A request that has some of its answer already."""
    choices = [Choice(0, 0, pack_u32([1] * num_generated))]
    request = make_request(request_id, num_tokens=num_tokens, epoch=epoch, yield_epoch=yields)
    return TokenizedRequest(
        **{name: getattr(request, name) for name in request.__struct_fields__} | {"choices": choices}
    )


def served(order: OrderPolicy, now: float = 0.0) -> list[str]:
    """Ids in the order in which they leave."""
    found = []
    while (head := order.head(now)) is not None:
        order.remove(head.request.request_id)
        order.on_sent(head)
        found.append(head.request.request_id)
    return found


def filled(order: OrderPolicy, *waiting: Waiting) -> OrderPolicy:
    for one in waiting:
        order.add(one, one.since)
    return order


@pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
def test_streams_that_had_begun_go_first_in_their_order_of_arrival(make: Callable[[], OrderPolicy]) -> None:
    waiting = [Waiting(make_request(f"r{i}", num_tokens=9, epoch=i % 2), i, 0.0, remaining=1.0) for i in range(4)]
    assert served(filled(make(), *waiting))[:2] == ["r1", "r3"]


@pytest.mark.parametrize("make", ORDERS.values(), ids=ORDERS)
@settings(max_examples=50, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3000), st.integers(0, 2), st.booleans()), max_size=40))
def test_what_waits_is_what_was_added_and_not_removed(
    make: Callable[[], OrderPolicy], plan: list[tuple[int, int, int, bool]]
) -> None:
    order, there = make(), dict[str, Waiting]()
    for ticket, (number, num_tokens, tenant, is_head) in enumerate(plan):
        request_id, head = f"r{number}", order.head(ticket)
        assert (head is None) == (not there)
        if head is not None and is_head:
            request_id = head.request.request_id
            assert there[request_id] is head
        if request_id in there:
            order.remove(request_id)
            del there[request_id]
        else:
            request = make_request(request_id, num_tokens=num_tokens, tenant=f"t{tenant}", priority=tenant)
            there[request_id] = Waiting(request, ticket, ticket, remaining=float(num_tokens))
            order.add(there[request_id], ticket)
        assert len(order) == len(there)
        assert {waiting.request.request_id for waiting in order} == set(there)
    with pytest.raises(KeyError):
        order.remove("nobody")
    assert set(served(order, 1e9)) == set(there)


def test_fcfs_serves_in_order_of_arrival_whatever_was_put_back() -> None:
    order = Fcfs()
    for ticket in (3, 1, 2):
        order.add(Waiting(make_request(f"r{ticket}"), ticket, 0.0), 0.0)
    assert served(order) == ["r1", "r2", "r3"]


def test_priority_is_passed_only_by_those_that_arrive_within_its_ageing() -> None:
    low = Waiting(make_request("low", priority=3), 0, 0.0)
    early = Waiting(make_request("early", priority=0), 1, 3 * AGEING_S - 1)
    late = Waiting(make_request("late", priority=0), 2, 3 * AGEING_S + 1)
    assert served(filled(Priority(), low, early, late)) == ["early", "low", "late"]


def test_sjf_serves_the_least_work_from_the_start() -> None:
    short = Waiting(make_request("short", num_tokens=10), 1, 0.0, remaining=20.0)
    # It has little left, and was long.
    rest = Waiting(generated("rest", 10, 100, epoch=1, yields=1), 0, 0.0, remaining=1.0)
    assert served(filled(Sjf(), rest, short)) == ["short", "rest"]


def test_srpt_serves_the_least_work_that_is_left() -> None:
    short = Waiting(make_request("short", num_tokens=10), 1, 0.0, remaining=20.0)
    rest = Waiting(generated("rest", 10, 100, epoch=1, yields=1), 0, 0.0, remaining=1.0, num_matched=110)
    cached = Waiting(make_request("cached", num_tokens=1000), 2, 0.0, remaining=20.0, num_matched=995)
    assert served(filled(Srpt(), short, cached, rest)) == ["rest", "cached", "short"]


def test_srpt_takes_a_long_prompt_for_less_work_than_a_long_answer() -> None:
    prompt = Waiting(make_request("prompt", num_tokens=700), 0, 0.0, remaining=40.0)
    answer = Waiting(make_request("answer", num_tokens=100), 1, 0.0, remaining=400.0)
    assert served(filled(Srpt(), answer, prompt)) == ["prompt", "answer"]


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 5000), st.floats(1, 5000), st.floats(0, 20)), min_size=2, max_size=30)
)
def test_srpt_lets_a_request_be_passed_only_within_its_ageing(arrivals: list[tuple[int, float, float]]) -> None:
    order, now, there, work = Srpt(), 0.0, dict[str, Waiting](), dict[str, float]()
    for ticket, (num_tokens, remaining, gap) in enumerate(arrivals):
        now += gap
        request_id = f"r{ticket}"
        there[request_id] = Waiting(make_request(request_id, num_tokens=num_tokens), ticket, now, remaining=remaining)
        work[request_id] = PROMPT_WORK * num_tokens + remaining
        order.add(there[request_id], now)
    found = served(order, now)
    assert set(found) == set(there)
    for position, early in enumerate(found):
        for passed in found[position + 1 :]:
            head_start = there[early].since - there[passed].since
            assert AGEING_TOKENS * head_start <= work[passed] - work[early] + 1e-6


@settings(max_examples=100, deadline=None)
@given(arrivals=st.lists(st.tuples(st.integers(-20, 20), st.floats(0, 60)), min_size=2, max_size=30))
def test_priority_lets_a_request_be_passed_only_within_its_ageing(arrivals: list[tuple[int, float]]) -> None:
    order, now, there = Priority(), 0.0, dict[str, Waiting]()
    for ticket, (priority, gap) in enumerate(arrivals):
        now += gap
        there[f"r{ticket}"] = Waiting(make_request(f"r{ticket}", priority=priority), ticket, now)
        order.add(there[f"r{ticket}"], now)
    found = served(order, now)
    for position, early in enumerate(found):
        for passed in found[position + 1 :]:
            head_start = there[early].since - there[passed].since
            steps = there[passed].request.priority - there[early].request.priority
            assert head_start <= AGEING_S * steps + 1e-6


def _work(waiting: Waiting) -> float:
    return PROMPT_WORK * waiting.request.num_prompt_tokens + waiting.remaining


# What each promises never to pass over: the least of this.
LEAST: dict[str, Callable[[Waiting], float]] = {
    "fcfs": lambda waiting: waiting.ticket,
    "sjf": _work,
    "edf": lambda waiting: waiting.deadline,
    "prefix_first": lambda waiting: -waiting.num_matched,
}


@pytest.mark.parametrize("name", LEAST)
@settings(max_examples=50, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.booleans(), st.integers(1, 500), st.floats(1, 500), st.floats(0, 90) | st.just(float("inf"))),
        max_size=40,
    )
)
def test_nobody_leaves_before_one_that_the_rule_prefers(name: str, plan: list[tuple[bool, int, float, float]]) -> None:
    order, least, there = ORDERS[name](), LEAST[name], dict[str, Waiting]()
    for ticket, (is_arrival, num_tokens, remaining, deadline) in enumerate(plan):
        now = float(ticket)
        if is_arrival:
            request = make_request(f"r{ticket}", num_tokens=num_tokens)
            there[f"r{ticket}"] = Waiting(
                request, ticket, now, remaining=remaining, num_matched=num_tokens % 7, deadline=deadline
            )
            order.add(there[f"r{ticket}"], now)
        elif (head := order.head(now)) is not None:
            assert least(head) == min(map(least, there.values()))
            order.remove(head.request.request_id)
            del there[head.request.request_id]


def test_edf_serves_deadlines_in_order_and_those_without_last() -> None:
    waiting = [
        Waiting(make_request(name), i, 0.0, deadline=deadline)
        for i, (name, deadline) in enumerate([("none", float("inf")), ("late", 9.0), ("soon", 2.0)])
    ]
    assert served(filled(Edf(), *waiting)) == ["soon", "late", "none"]


def test_prefix_first_serves_the_longest_match() -> None:
    waiting = [Waiting(make_request(f"r{n}", num_tokens=100), n, 0.0, num_matched=n * 16) for n in (0, 3, 1)]
    assert served(filled(PrefixFirst(), *waiting)) == ["r3", "r1", "r0"]


def test_mlfq_joins_the_first_level_that_its_prompt_fits() -> None:
    long = Waiting(make_request("long", num_tokens=4 * FIRST_QUANTUM), 0, 0.0)
    short = Waiting(make_request("short", num_tokens=FIRST_QUANTUM - 1), 1, 0.0)
    assert served(filled(Mlfq(), long, short)) == ["short", "long"]


def test_mlfq_hands_back_at_the_end_of_a_quantum_and_then_goes_behind() -> None:
    order, first = Mlfq(), Waiting(make_request("first", num_tokens=56), 0, 0.0)
    quantum = order.quantum(first)
    assert quantum == FIRST_QUANTUM - 56
    again = Waiting(generated("first", 56, quantum, epoch=1, yields=1), 0, 0.0)
    fresh = Waiting(make_request("fresh", num_tokens=100), 1, 0.0)
    assert served(filled(order, again, fresh)) == ["fresh", "first"]
    assert order.quantum(again) == FIRST_QUANTUM
    deep = Waiting(generated("deep", 10, FIRST_QUANTUM << NUM_LEVELS), 2, 0.0)
    assert order.quantum(deep) is None, "nobody would come after the last level"


def test_mlfq_keeps_the_place_of_a_request_that_is_put_back() -> None:
    first, second = (Waiting(make_request(name), ticket, 0.0) for ticket, name in enumerate(("first", "second")))
    order = filled(Mlfq(), first, second)
    order.remove("first")
    assert order.head(0.0) is second
    order.add(first, 1.0)
    assert served(order) == ["first", "second"]


@settings(max_examples=50, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 4000), st.floats(0, 20)), min_size=1, max_size=12),
    token_s=st.floats(1e-4, 0.1),
)
def test_mlfq_goes_down_with_the_work_and_passes_nobody_of_a_level_above_who_has_not_starved(
    requests: list[tuple[int, int, float]], token_s: float
) -> None:
    order, now, ticket = Mlfq(), 0.0, 0
    arrivals = sorted((at, f"r{i}") for i, (_, _, at) in enumerate(requests))
    lengths = {f"r{i}": (prompt, answer) for i, (prompt, answer, _) in enumerate(requests)}
    has, quanta, there = dict.fromkeys(lengths, 0), dict[str, list[int | None]](), dict[str, Waiting]()

    def put(request_id: str) -> None:
        nonlocal ticket
        ticket += 1
        request = generated(request_id, lengths[request_id][0], has[request_id], ticket, ticket)
        there[request_id] = Waiting(request, ticket, now)
        order.add(there[request_id], now)

    while there or arrivals:
        now = now if there else max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            put(arrivals.pop(0)[1])
        head = order.head(now)
        assert head is not None
        waited = {name: now - waiting.since for name, waiting in there.items()}
        name = head.request.request_id
        if max(waited.values()) > STARVATION_S:
            assert waited[name] == max(waited.values()), "one that has starved longer goes before"
        else:
            assert _level(head) == min(map(_level, there.values()))
        order.remove(name)
        del there[name]
        quantum, left = order.quantum(head), lengths[name][1] - has[name]
        quanta.setdefault(name, []).append(quantum)
        has[name] += left if quantum is None else min(quantum, left)
        now += token_s * (left if quantum is None else min(quantum, left))
        if has[name] < lengths[name][1]:
            put(name)
            assert _level(there[name]) > _level(head), "who uses up a quantum goes down"
    assert has == {name: answer for name, (_, answer) in lengths.items()}
    assert all(len(given) <= NUM_LEVELS for given in quanta.values())


def _level(waiting: Waiting) -> int:
    """The first level whose tokens, doubled from level to level, are more than prompt and answer have used."""
    level = 0
    while level < NUM_LEVELS - 1 and waiting.request.num_tokens >= FIRST_QUANTUM * 2**level:
        level += 1
    return level


def test_mlfq_starves_nobody() -> None:
    order = filled(Mlfq(), Waiting(make_request("long", num_tokens=9000), 0, 0.0))
    order.add(Waiting(make_request("short", num_tokens=1), 1, STARVATION_S), STARVATION_S)
    before, after = order.head(STARVATION_S), order.head(STARVATION_S + 1)
    assert before is not None and before.request.request_id == "short"
    assert after is not None and after.request.request_id == "long"


def test_fair_serves_tenants_by_what_they_had() -> None:
    order = Fair()
    for i in range(4):
        order.add(Waiting(make_request(f"a{i}", num_tokens=100, tenant="a"), i, 0.0, remaining=50.0), 0.0)
    for i in range(2):
        order.add(Waiting(make_request(f"b{i}", num_tokens=200, tenant="b"), 4 + i, 0.0, remaining=100.0), 0.0)
    assert served(order) == ["a0", "b0", "a1", "a2", "b1", "a3"]


def test_fair_charges_by_weight_and_corrects_predictions() -> None:
    order = Fair({"a": 2.0})
    one = Waiting(make_request("a0", num_tokens=100, tenant="a"), 0, 0.0, remaining=50.0)
    order.on_sent(one)
    assert order.had("a") == (100 + OUTPUT_WEIGHT * 50) / 2
    order.on_ended("a", 50.0, 10)
    assert order.had("a") == (100 + OUTPUT_WEIGHT * 10) / 2
    order.on_put_back(one)
    assert order.had("a") == OUTPUT_WEIGHT * (10 - 50) / 2


def test_fair_lets_nobody_save_up() -> None:
    order = Fair()
    for i in range(3):
        order.add(Waiting(make_request(f"a{i}", num_tokens=1000, tenant="a"), i, 0.0), 0.0)
    for _ in range(2):
        head = order.head(0.0)
        assert head is not None
        order.remove(head.request.request_id)
        order.on_sent(head)
    order.add(Waiting(make_request("b0", num_tokens=10, tenant="b"), 9, 0.0), 0.0)
    assert order.had("b") == order.had("a") == 2000


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(0, 200)), min_size=30, max_size=60),
    weight=st.floats(0.25, 4.0),
)
def test_two_tenants_that_always_wait_differ_by_one_request_at_most(
    sizes: list[tuple[int, int]], weight: float
) -> None:
    weights = {"a": 1.0, "b": weight}
    order, largest = Fair(weights), 0.0
    for i, (prompt, answer) in enumerate(sizes):
        tenant = "ab"[i % 2]
        largest = max(largest, (prompt + OUTPUT_WEIGHT * answer) / weights[tenant])
        request = make_request(f"r{i}", num_tokens=prompt, tenant=tenant)
        order.add(Waiting(request, i, 0.0, remaining=float(answer)), 0.0)
    while (head := order.head(0.0)) is not None:
        order.remove(head.request.request_id)
        order.on_sent(head)
        if {waiting.request.tenant for waiting in order} == {"a", "b"}:
            assert abs(order.had("a") - order.had("b")) <= largest + 1e-6
