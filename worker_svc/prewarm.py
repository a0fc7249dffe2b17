"""A worker process that has imported everything and waits for its orders: `python -m worker_svc --prewarm`.

It knows no model. Source: DeepFlow's pre-warmed task executors (Hu et al. 2025, section 6).
"""

from __future__ import annotations

import importlib
import os
import time

from weft.start_times import StartTimes
from worker_svc.orders import obey, wait_for_orders


def become_worker() -> StartTimes:
    """Wait, and become the worker that is wanted, whose start begins with its orders."""
    line = wait_for_orders()
    times = StartTimes(time.monotonic())
    obey(line)
    return times


def import_engine() -> None:
    """Import what a worker with a model needs, all that a worker without one (`null`) does not."""
    if os.environ.get("WEFT_ENGINE") == "null":
        return
    importlib.import_module("worker_svc.torch_engine")
    inputs = importlib.import_module("worker_svc.cpu_kernels.inputs")
    launch = importlib.import_module("worker_svc.cpu_kernels.launch")
    if launch.IS_AVAILABLE:
        # The first kernel that is loaded takes numba's own registries along, which are most of the time. No tensor is
        # touched: threads of OpenMP belong to the thread that computes.
        kernel = next(value for value in vars(inputs).values() if isinstance(value, launch.Kernel))
        assert kernel.address
