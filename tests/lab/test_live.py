"""lab.live: a real mesh is measured, and its simulation plays the same requests."""

from __future__ import annotations

from lab.live import Run, live, make_trace, simulated
from lab.simulator.fit import Step
from lab.simulator.record import Record
from lab.times import Times
from worker_svc.batch import Work


def test_a_live_run_says_what_its_simulation_needs() -> None:
    trace = make_trace(1, rate_rps=6.0, seconds=1.0)

    found = live("tales-1m", trace)
    machine = found.measured()
    played = simulated(trace, machine)

    assert len(found.times.ttfts_s) == len(played.ttfts_s) == len(trace.arrivals) > 2
    # The probes' prompts, and each of the trace's, were computed once.
    prompts = sum(arrival.num_prompt_tokens for arrival in trace.arrivals) + 64 * len(found.probes_s)
    assert sum(step.work.num_new for step in found.steps) == prompts
    assert len(machine.errors) == len(found.steps) // 2 and len(machine.spread) == 101
    for times in (played, found.times):
        assert (times.ttfts_s > 0).all() and (times.decodes_s > times.gaps_s - 1e-9).all()


def test_a_hop_is_what_a_lone_request_waits_beside_its_own_step() -> None:
    steps = tuple(Step(Work(64, 2048, num_chunks=1) if i % 2 == 0 else Work(0, 0, 1, 65), 0.01) for i in range(40))
    nothing = Times.of([], Record.worst_gap_s)

    found = Run((0.02, 0.02, 0.02), nothing, steps).measured()

    assert found.hop_s == 0.01 / 5
