"""Calls with a deadline: those in time get through, those that are late are stopped, and nobody waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tests.support.wait import until
from tokenizer_svc import deadline_threads
from tokenizer_svc.deadline_threads import DeadlineThreads
from weft.errors import InvalidRequest, Overloaded, WeftError


def late() -> WeftError:
    return InvalidRequest("too late")


def spin(stop: threading.Event) -> int:
    """Python that runs until it is told, or made, to stop."""
    count = 0
    while not stop.is_set():
        count += 1
    return count


@pytest.fixture
async def threads() -> AsyncIterator[DeadlineThreads]:
    found = DeadlineThreads(0.1)
    yield found
    found.close()


async def test_result_and_exception_come_back(threads: DeadlineThreads) -> None:
    assert await threads.call(lambda: 1 + 1, late) == 2
    with pytest.raises(ZeroDivisionError):
        await threads.call(lambda: 1 // 0, late)


async def test_late_call_is_stopped_and_its_thread_ends(threads: DeadlineThreads) -> None:
    never = threading.Event()
    with pytest.raises(InvalidRequest, match="too late"):
        await threads.call(lambda: spin(never), late)
    await until(lambda: threads.num_given_up == 0)


async def test_exception_at_the_deadline_is_not_caught_by_the_call(threads: DeadlineThreads) -> None:
    def stubborn() -> None:
        while True:
            try:
                spin(threading.Event())
            except Exception:
                continue

    with pytest.raises(InvalidRequest):
        await threads.call(stubborn, late)
    await until(lambda: threads.num_given_up == 0)


async def test_other_calls_do_not_wait_for_a_slow_one() -> None:
    threads = DeadlineThreads(1.0)
    slow = [asyncio.create_task(threads.call(lambda: spin(threading.Event()), late)) for _ in range(2)]
    await asyncio.sleep(0)
    assert await threads.call(lambda: "quick", late) == "quick"
    assert not any(task.done() for task in slow)
    results = await asyncio.gather(*slow, return_exceptions=True)
    assert all(isinstance(result, InvalidRequest) for result in results)
    threads.close()


async def test_call_that_python_cannot_stop_is_counted_and_later_ones_still_run(threads: DeadlineThreads) -> None:
    blocked = threading.Event()
    with pytest.raises(InvalidRequest):
        # Waiting in C, where no exception arrives.
        await threads.call(blocked.wait, late)
    assert threads.num_given_up == 1
    assert threads.is_live
    assert await threads.call(lambda: "fine", late) == "fine"
    blocked.set()
    await until(lambda: threads.num_given_up == 0)


async def test_service_is_not_live_when_no_thread_is_left(
    threads: DeadlineThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline_threads, "MAX_THREADS", 2)
    blocked = threading.Event()
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            await threads.call(blocked.wait, late)
    assert not threads.is_live
    blocked.set()
    await until(lambda: threads.is_live)


async def test_waiting_calls_are_bounded(threads: DeadlineThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline_threads, "MAX_THREADS", 1)
    monkeypatch.setattr(deadline_threads, "MAX_WAITING", 2)
    go = threading.Event()
    tasks = [asyncio.create_task(threads.call(lambda: go.wait(5), late)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await threads.call(lambda: 1, late)
    go.set()
    assert await asyncio.gather(*tasks) == [True] * 3


async def test_cancelled_call_is_not_run(threads: DeadlineThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline_threads, "MAX_THREADS", 1)
    go, ran = threading.Event(), []
    first = asyncio.create_task(threads.call(lambda: go.wait(5), late))
    second = asyncio.create_task(threads.call(lambda: ran.append(1), late))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    go.set()
    await first
    assert await threads.call(lambda: 3, late) == 3
    assert not ran


async def test_closing_stops_the_calls_that_run() -> None:
    threads = DeadlineThreads(60.0)
    before = set(threading.enumerate())
    running = asyncio.create_task(threads.call(lambda: spin(threading.Event()), late))
    await until(lambda: set(threading.enumerate()) - before)
    (thread,) = set(threading.enumerate()) - before
    threads.close()
    await until(lambda: not thread.is_alive())
    running.cancel()
