from __future__ import annotations

import time

from weft.start_times import StartTimes


def test_steps_add_up_to_the_time_since_the_process_began() -> None:
    before = time.monotonic()
    times = StartTimes()
    times.mark("imports")
    times.mark("connect")
    # This process has run for longer than this test.
    assert times.steps["imports"] > times.steps["connect"] >= 0.0
    assert sum(times.steps.values()) >= time.monotonic() - before - 0.001
    assert list(times.fields()) == ["imports_s", "connect_s", "start_s"]


def test_a_step_that_comes_twice_is_counted_together_and_a_part_may_be_moved() -> None:
    times = StartTimes(began=time.monotonic() - 10.0)
    times.mark("load")
    times.mark("load")
    times.move(4.0, "load", "warm_up")
    assert times.steps["warm_up"] == 4.0
    assert 6.0 <= times.steps["load"] < 7.0
