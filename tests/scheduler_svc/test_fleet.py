"""The fleet: models come and go with their workers, and assignments are on their way until accounted for."""

from __future__ import annotations

import pytest

from scheduler_svc.fleet import Fleet
from scheduler_svc.workers import Worker
from tests.support.scheduling import MODEL, SCHEDULER, make_flight, make_request, make_status, make_worker
from weft.errors import InvariantViolation


def make_fleet(*workers: Worker) -> Fleet:
    fleet = Fleet()
    for worker in workers:
        fleet.add(worker)
        fleet.refresh(worker)
    return fleet


def test_a_model_is_there_as_long_as_a_worker_of_it() -> None:
    fleet = make_fleet(make_worker(0), make_worker(1), make_worker(2, model="other"))
    fleet.remove("w0")
    assert (fleet.models(), fleet.count(MODEL), len(fleet.open(MODEL))) == ([MODEL, "other"], 1, 1)
    fleet.remove("w1")
    assert (fleet.models(), fleet.count(MODEL), len(fleet.ready(MODEL)), len(fleet)) == (["other"], 0, 0, 1)
    fleet.check()


def test_a_worker_that_is_not_ready_is_neither_open_nor_in_the_totals() -> None:
    fleet = make_fleet(make_worker(0, state="draining"), make_worker(1, load=64))
    assert (len(fleet.open(MODEL)), len(fleet.ready(MODEL)), fleet.count(MODEL)) == (0, 1, 2)
    fleet.check()


def test_an_assignment_is_on_its_way_until_a_status_accounts_for_it() -> None:
    fleet, worker = make_fleet(make_worker(0)), make_worker(1)
    fleet.add(worker)
    flights = [make_flight(make_request(f"r{number}")) for number in range(3)]
    for number, flight in enumerate(flights):
        fleet.send(worker, flight, number)
    assert (fleet.bound_for(("r1", 0)), fleet.num_in_flight) == (worker, 3)
    assert fleet.take_back(worker, ("r1", 0)) is flights[1]
    fleet.refresh(worker)
    assert fleet.apply(worker, make_status("w1", num_running=1, accepted={SCHEDULER: 1}), SCHEDULER, 0.1) == 0
    assert [fleet.bound_for((f"r{number}", 0)) for number in range(3)] == [None, None, worker]
    assert fleet.apply(worker, make_status("w1", num_running=1, accepted={SCHEDULER: 1}), SCHEDULER, 9.0) == 1
    assert not fleet.num_in_flight
    fleet.check()


def test_what_is_on_its_way_to_a_worker_that_goes_is_forgotten() -> None:
    fleet, worker = make_fleet(), make_worker(0)
    fleet.add(worker)
    fleet.send(worker, make_flight(make_request("r0")), 0)
    assert list(fleet.remove("w0").in_flight) == [("r0", 0)]
    assert fleet.bound_for(("r0", 0)) is None and not fleet.num_in_flight


def test_a_worker_that_changed_unseen_is_found_by_a_check() -> None:
    worker = make_worker(0)
    fleet = make_fleet(worker)
    worker.send(make_flight(make_request("r0")), 0)
    with pytest.raises(InvariantViolation, match="on their way"):
        fleet.check()
