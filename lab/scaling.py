"""What it takes to start a worker, by each way to start one: `python -m lab.scaling [--only NAME] [--json FILE]`.

`from_zero`: each run is a `weft up --scale queue` of its own with the bundled model and no worker; the first request
starts one, cold, from a pre-warmed process, or forked from one that has loaded the model, in turn. What each step of
the worker's start took is what the worker itself logs. `memory` and `page_cache` are of a model of 125 million
parameters in float32, with random weights.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import uvloop

from lab import ring
from lab.client import complete
from lab.mesh import MODEL
from lab.peers import checkpoints
from lab.report import Figure, median_figure, run, say
from lab.ring import wait_until_idle
from weft import model_folder
from weft.settings import ModelSettings

HOST: Final = "127.0.0.1"
STEPS: Final = ("fork", "imports", "connect", "folder", "load", "warm_up", "ready", "start")
WAYS: Final[dict[str, tuple[str, ...]]] = {"cold": (), "pre-warmed": ("--prewarm", "1"), "forked": ("--fork",)}
# A worker's template loads for longer than other servers take to come to rest.
IDLE_LIMIT_S: Final = 60.0
NUM_WORKERS: Final = 4


def from_zero(repeats: int = 5) -> list[Figure]:
    """Time from the request to its first token, and where the worker spent it."""
    ttfts: dict[str, list[float]] = {way: [] for way in WAYS}
    starts: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, flags in WAYS.items():
            ttft_s, steps = _first_token(*flags)
            say(f"  {way}: {ttft_s:.2f} s, " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in steps.items()))
            ttfts[way].append(ttft_s)
            starts[way].append(steps)
    bars = {"cold": None, "pre-warmed": 3.0, "forked": 3.0}
    figures = [
        median_figure(f"from zero to the first token, {way}", seconds, "s", bar=bars[way])
        for way, seconds in ttfts.items()
    ]
    for way, those in starts.items():
        middle = {name: statistics.median(steps[name] for steps in those) for name in those[0]}
        figures += [Figure(f"  {way} worker, {name}", seconds, "s") for name, seconds in middle.items()]
    return figures


def memory() -> list[Figure]:
    """What workers hold in memory just after their start, what they share divided among them."""
    held: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="weft-scaling-") as folder:
        model = checkpoints.folder(Path(folder), "small")
        for way, flags in (("plainly started", ()), ("forked", ("--fork",))):
            with ring.running("--model", str(model), "--workers", str(NUM_WORKERS), *flags) as mesh:
                pids = mesh.pids("worker_svc")
                held[way] = sum(_proportional_bytes(pid) for pid in pids) / 2**20
                say(f"  {way}: {held[way]:.0f} MiB in {len(pids)} processes")
    return [
        Figure(f"memory of {NUM_WORKERS} workers, {way}", mib, "MiB", note="the template included" * (way == "forked"))
        for way, mib in held.items()
    ]


def page_cache(repeats: int = 5) -> list[Figure]:
    """Loading the weights from files that the system has in memory, and that it must read from the disk."""
    # Torch is needed here alone.
    from worker_svc.loaded_model import load_model
    from worker_svc.model_options import ModelOptions

    times: dict[str, list[float]] = {"in the page cache": [], "evicted": []}
    with tempfile.TemporaryDirectory(prefix="weft-scaling-") as place:
        path = checkpoints.folder(Path(place), "small")
        folder = model_folder.read(ModelSettings(model=str(path)))

        def load() -> None:
            load_model(folder, ModelOptions(device="cpu", threads=1))

        load()
        for _ in range(repeats):
            times["in the page cache"].append(_seconds(load))
            for file in path.glob("*.safetensors"):
                _evict(file)
            times["evicted"].append(_seconds(load))
    return [median_figure(f"loading the weights, {where}", seconds, "s") for where, seconds in times.items()]


def _first_token(*flags: str) -> tuple[float, dict[str, float]]:
    """Seconds to the first token of a mesh without workers, and the steps of the worker's start."""
    with tempfile.TemporaryDirectory(prefix="weft-scaling-") as folder:
        scale = ("--data-path", folder, "--scale", "queue", "--min-workers", "0", "--max-workers", "1")
        with ring.running(*scale, *flags) as mesh:
            wait_until_idle(IDLE_LIMIT_S)
            body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "stream": True}
            stream = uvloop.run(complete(HOST, mesh.port, body))
        return stream.ttft_s, _steps(Path(folder, "logs", "worker-0.log").read_text())


def _steps(log: str) -> dict[str, float]:
    """What the worker said when it was ready. Raises RuntimeError if it was not."""
    line = next((line for line in log.splitlines() if "start_s=" in line), None)
    if line is None:
        raise RuntimeError(f"the worker was never ready:\n{log}")
    found = dict(re.findall(r"(\w+)_s=([0-9.]+)", line))
    return {name: float(found[name]) for name in STEPS if name in found}


def _proportional_bytes(pid: int) -> int:
    """A process's memory, each page divided by the number of processes that have it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _evict(file: Path) -> None:
    """Out of the page cache with a file, which must have reached the disk for it."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    run({"from_zero": from_zero, "memory": memory, "page_cache": page_cache}, __doc__ or "")
