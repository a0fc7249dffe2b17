"""How long a device computed a step: by its own clock where it has one, else by the host's."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Runs from its making until `stop`."""

    def stop(self) -> None:
        """The step's last operation has been handed to the device."""

    def seconds(self) -> float:
        """Of the device's work; waits for its end."""


class HostStopwatch:
    """For a device that is done when a call returns."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._started

    def seconds(self) -> float:
        return self._seconds


class CudaStopwatch:
    """Two events in the stream; starts when the device comes to it."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        self._begin.record()

    def stop(self) -> None:
        self._end.record()

    def seconds(self) -> float:
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1000


def start(device: torch.device) -> Stopwatch:
    """A stopwatch of the device's kind."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()
