"""The pool's orders against sorting."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.pool import Pool
from scheduler_svc.workers import Worker
from tests.support.scheduling import make_worker

ROLES = ("both", "prefill", "decode")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 90), st.booleans()), max_size=80),
    st.integers(0, 2**41),
    st.integers(0, 40),
)
def test_orders_are_those_of_sorting(steps: list[tuple[int, int, int, bool]], mask: int, asked_after: int) -> None:
    pool, there = Pool(), dict[str, Worker]()
    for number, (bit, load, waiting, is_in) in enumerate(steps):
        known = there.get(f"w{bit}")
        if is_in:
            worker = make_worker(bit, load, waiting_tokens=waiting, last_used=number, role=ROLES[bit % 3])
            if known is not None:
                # The pool sees the same object change.
                known.status, known.last_used = worker.status, number
                known.refresh(1)
                worker = known
            there[worker.name] = worker
            pool.put(worker)
        elif known is not None:
            pool.discard(there.pop(known.name))
        if number == asked_after:
            # What somebody asked for once is kept up from then on.
            for order in (pool.by_rank, pool.by_queue, pool.by_use):
                assert len(list(order)) == sum(len(pool.of_role(role)) for role in ROLES)
    workers = list(there.values())
    assert len(pool) == len(workers)
    assert list(pool.by_rank) == sorted(workers, key=lambda worker: worker.rank)
    assert list(pool.by_queue) == sorted(workers, key=lambda worker: (worker.waiting_tokens, worker.rank))
    assert list(pool.by_use) == sorted(workers, key=lambda worker: (worker.last_used, worker.name))
    assert pool.mask == sum(1 << worker.bit for worker in workers)
    inside = [worker for worker in pool.by_queue if mask >> worker.bit & 1]
    assert list(pool.by_queue.within(mask)) == inside
    if inside:
        assert pool.by_queue.any_of(mask) in inside
    for role in ROLES:
        assert set(map(id, pool.of_role(role))) == {id(worker) for worker in workers if worker.status.role == role}
    if workers:
        loads = [worker.load for worker in workers]
        assert pool.loads() == (min(loads), max(loads))
        assert pool.least() is min(workers, key=lambda worker: worker.rank)
