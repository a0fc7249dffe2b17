"""How long each step of a process's start took: what is slow when workers start from zero?"""

from __future__ import annotations

import os
import time
from pathlib import Path


class StartTimes:
    """Seconds by step, in the order in which they ended; the first begins with the process."""

    def __init__(self, began: float | None = None) -> None:
        """`began`: when the start began, in `time.monotonic()` seconds, if that was not with the process."""
        self.steps: dict[str, float] = {}
        self._last = _process_began() if began is None else began

    def mark(self, step: str) -> None:
        """A step has ended, and the next begins. Mutates self."""
        now = time.monotonic()
        self.steps[step] = self.steps.get(step, 0.0) + now - self._last
        self._last = now

    def move(self, seconds: float, step: str, to: str) -> None:
        """So much of a step was another one. Mutates self."""
        self.steps[step] -= seconds
        self.steps[to] = self.steps.get(to, 0.0) + seconds

    def fields(self) -> dict[str, float]:
        """As `<step>_s`, and all of them as `start_s`."""
        found = {f"{step}_s": round(seconds, 3) for step, seconds in self.steps.items()}
        return found | {"start_s": round(sum(self.steps.values()), 3)}


def _process_began() -> float:
    """When this process was started, where the system says so; else now."""
    now = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        # Since the machine's start, as `CLOCK_BOOTTIME` counts.
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return now
