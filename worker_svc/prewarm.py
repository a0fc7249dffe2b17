"""A worker process that has imported everything and waits for its orders: `python -m worker_svc --prewarm`.

It knows no model. Its orders are one line of JSON on standard input: the environment that settings are read from, and
the log file to write to. Without a line before the end of the input it ends.
Source: DeepFlow's pre-warmed task executors (Hu et al. 2025, section 6).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def wait_for_orders() -> float:
    """Wait, and become the worker that is wanted; returns when the orders came."""
    line = sys.stdin.buffer.readline()
    began = time.monotonic()
    if not line:
        sys.exit(0)
    orders = json.loads(line)
    os.environ.update(orders["environ"])
    log = os.open(orders["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return began


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
