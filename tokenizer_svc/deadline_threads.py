"""Calls that must end by a deadline, each in a thread that is given up if they do not.

A chat template is a program: it may loop for longer than any client waits. Python can raise an exception in another
thread, but nobody can say when it arrives; so a thread whose call passed the deadline is never used again, whatever
becomes of it. Handing a call over and back costs tens of microseconds.
"""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from weft.errors import Overloaded, WeftError

T = TypeVar("T")

MAX_THREADS: Final = 8
MAX_WAITING: Final = 1024


class _Stopped(BaseException):
    """Raised inside a call at its deadline; no `except Exception` of a template's filters catches it."""


class _Call(Generic[T]):
    def __init__(self, function: Callable[[], T], future: asyncio.Future[T], late: Callable[[], WeftError]) -> None:
        self.function = function
        self.future = future
        self.late = late

    def resolve(self, result: T | BaseException) -> None:
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class DeadlineThreads:
    """A few threads for calls with a deadline; used from one event loop."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._idle: list[_Thread] = []
        self._busy: set[_Thread] = set()
        self._given_up: set[_Thread] = set()
        self._waiting: deque[_Call[object]] = deque()

    @property
    def num_given_up(self) -> int:
        """Threads whose call passed its deadline and has not ended yet."""
        self._given_up = {thread for thread in self._given_up if thread.is_alive()}
        return len(self._given_up)

    @property
    def is_live(self) -> bool:
        """False if so many calls cannot be stopped that there is no thread left."""
        return self.num_given_up < MAX_THREADS

    async def call(self, function: Callable[[], T], late: Callable[[], WeftError]) -> T:
        """Run `function` in a thread; its result or exception.

        Raises:
            Overloaded: too many calls wait already.
            WeftError: what `late` makes, if the deadline passed; it counts from the call's own start.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded("too many chat prompts wait to be rendered", retry_after_s=self._deadline_s)
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(_Call(function, future, late))  # type: ignore[arg-type]  # a queue of calls of all kinds
        self._start_next()
        return await future

    def close(self) -> None:
        """End all threads; calls that still run are stopped, since nobody waits for them."""
        for thread in self._idle:
            thread.put(None)
        for thread in self._busy:
            if thread.timer is not None:
                thread.timer.cancel()
            thread.interrupt()

    def _start_next(self) -> None:
        while self._waiting:
            if self._idle:
                thread = self._idle.pop()
            elif len(self._busy) + self.num_given_up < MAX_THREADS:
                thread = _Thread(self._loop, self._ended)
            else:
                return
            call = self._waiting.popleft()
            if call.future.done():
                self._idle.append(thread)
                continue
            self._busy.add(thread)
            thread.call = call
            thread.timer = self._loop.call_later(self._deadline_s, self._give_up, thread, call)
            thread.put(call)

    def _ended(self, thread: _Thread, call: _Call[object], result: object) -> None:
        """On the loop: a call has ended, by itself or stopped."""
        call.resolve(result)
        if thread in self._busy:
            self._busy.discard(thread)
            if thread.timer is not None:
                thread.timer.cancel()
            self._idle.append(thread)
        else:
            thread.put(None)
        self._start_next()

    def _give_up(self, thread: _Thread, call: _Call[object]) -> None:
        self._busy.discard(thread)
        self._given_up.add(thread)
        call.resolve(call.late())
        thread.interrupt()
        self._start_next()


class _Thread:
    """One thread that runs one call after the other."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, ended: Callable[[_Thread, _Call[object], object], None]
    ) -> None:
        self.call: _Call[object] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._loop = loop
        self._ended = ended
        self._calls: queue.SimpleQueue[_Call[object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="render", daemon=True)
        self._thread.start()

    def put(self, call: _Call[object] | None) -> None:
        self._calls.put(call)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def interrupt(self) -> None:
        """Raise `_Stopped` in the thread, at its next Python instruction."""
        ident = self._thread.ident
        assert ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_Stopped))

    def _run(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                try:
                    result: object = call.function()
                except Exception as error:
                    result = error
                self._loop.call_soon_threadsafe(self._ended, self, call, result)
        except _Stopped:
            return
        except RuntimeError:
            # The loop has closed: nobody waits for the result.
            return
