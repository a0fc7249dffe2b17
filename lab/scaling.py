"""From no worker to the first token, cold and pre-warmed: `python -m lab.scaling [--only NAME] [--json FILE]`.

Each run is a `weft up --scale queue` of its own with the bundled model and no worker; the first request starts one.
Cold and pre-warmed take turns. What each step of the worker's start took is what the worker itself logs.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from pathlib import Path
from typing import Final

import uvloop

from lab import ring
from lab.client import complete
from lab.mesh import MODEL
from lab.report import Figure, median_figure, run, say
from lab.ring import wait_until_idle

HOST: Final = "127.0.0.1"
STEPS: Final = ("imports", "connect", "folder", "load", "warm_up", "ready", "start")


def from_zero(repeats: int = 5) -> list[Figure]:
    """Time from the request to its first token, and where the worker spent it."""
    ttfts: dict[str, list[float]] = {"cold": [], "pre-warmed": []}
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "pre-warmed": []}
    for _ in range(repeats):
        for kind, flags in (("cold", ()), ("pre-warmed", ("--prewarm", "1"))):
            ttft_s, steps = _first_token(*flags)
            say(f"  {kind}: {ttft_s:.2f} s, " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in steps.items()))
            ttfts[kind].append(ttft_s)
            starts[kind].append(steps)
    figures = [
        median_figure("from zero to the first token, cold", ttfts["cold"], "s"),
        median_figure("from zero to the first token, pre-warmed", ttfts["pre-warmed"], "s", bar=3.0),
    ]
    for kind, those in starts.items():
        middle = {name: statistics.median(steps[name] for steps in those) for name in STEPS}
        figures += [Figure(f"  {kind} worker, {name}", seconds, "s") for name, seconds in middle.items()]
    return figures


def _first_token(*flags: str) -> tuple[float, dict[str, float]]:
    """Seconds to the first token of a mesh without workers, and the steps of the worker's start."""
    with tempfile.TemporaryDirectory(prefix="weft-scaling-") as folder:
        scale = ("--data-path", folder, "--scale", "queue", "--min-workers", "0", "--max-workers", "1")
        with ring.running(*scale, *flags) as mesh:
            wait_until_idle()
            body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "stream": True}
            stream = uvloop.run(complete(HOST, mesh.port, body))
        return stream.ttft_s, _steps(Path(folder, "logs", "worker-0.log").read_text())


def _steps(log: str) -> dict[str, float]:
    """What the worker said when it was ready. Raises RuntimeError if it was not."""
    line = next((line for line in log.splitlines() if "start_s=" in line), None)
    if line is None:
        raise RuntimeError(f"the worker was never ready:\n{log}")
    found = dict(re.findall(r"(\w+)_s=([0-9.]+)", line))
    return {name: float(found[name]) for name in STEPS}


if __name__ == "__main__":
    run({"from_zero": from_zero}, __doc__ or "")
