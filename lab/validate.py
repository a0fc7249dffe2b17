"""How far the simulator is from what it simulates: `python -m lab.validate [--only NAME] [--traces FOLDER]`.

`steps`: the cost formula, fitted to half of a live engine's step times, against the other half. `mesh`: what clients of
a live mesh see, against its simulation. `recorded`: four runs of vLLM that others recorded; the constants are fitted to
every other request's times, and the rest are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np

from lab import live
from lab.calibrate import BAR, calibrate
from lab.peers import checkpoints
from lab.recorded import Recording, fit_recording, measured, read_recordings, simulated
from lab.report import Benchmark, Figure, flags, measure, say
from lab.times import Array, Times
from weft.settings import WorkerSettings, load

TRACES: Final = Path(__file__).parent.parent.parent / "shared" / "traces"
QUANTILES: Final = (0.5, 0.9, 0.99)
# Of a quantile of times. LLMServingSim, whose recordings these are, says 2 % of the gaps, and up to 22 % of the time to
# the first token near idle, so that there a tenth of a second, a step or two, is as good.
RECORDED_BAR: Final = 0.10
FLOOR_S: Final = 0.1
# Requests a second: near idle, and at some four fifths of what the worker can do. Runs of each, and how long one is.
RATES_RPS: Final = (0.4, 1.5)
NUM_RUNS: Final = 3
RUN_S: Final = 40.0
LIVE_BAR: Final = 0.15
# Near idle a few milliseconds are much of a short time, and nothing to anybody who waits.
LIVE_FLOOR_S: Final = 0.01


def step_times() -> list[Figure]:
    """Steps of live engines, one at a time: of a model with 125 million parameters, and of the bundled one."""
    figures = []
    with _small_model() as small:
        for model, bar in ((small, 100 * BAR), ("tales-6m", None)):
            found = calibrate(load(WorkerSettings, ["--model", model], {}, prog="lab.validate"))
            note = f"{len(found.errors)} held out, as many fitted, {found.hardware.what}"
            name = f"{found.hardware.what.split()[0]}, step times held out"
            figures += [
                Figure(f"{name}, mean error", 100 * found.mean_error, "%", bar, note=note),
                Figure(f"{name}, worst error", 100 * max(found.errors), "%", note=note),
            ]
    return figures


def live_mesh() -> list[Figure]:
    """Clients of a live mesh on this machine, whose engine, services and clients share the cores, at two loads."""
    figures = []
    with _small_model() as model:
        for rate_rps in RATES_RPS:
            pairs: list[tuple[Times, Times]] = []
            errors: list[float] = []
            for seed in range(NUM_RUNS):
                trace = live.make_trace(seed, rate_rps, RUN_S)
                found = live.live(model, trace)
                machine = found.measured()
                pairs.append((found.times, live.simulated(trace, machine)))
                errors += machine.errors
                say(f"  {rate_rps:g}/s, run {seed}: {len(trace.arrivals)} requests, a hop {1e3 * machine.hop_s:.1f} ms")
            start = f"live mesh, {rate_rps:g} requests/s"
            figures.append(Figure(f"{start}, steps held out, mean error", 100 * fmean(errors), "%", 100 * BAR))
            for name, field in (("time to first token", "ttfts_s"), ("time between tokens", "gaps_s")):
                real, played = (
                    np.concatenate([getattr(side, field) for side in sides]) for sides in zip(*pairs, strict=True)
                )
                figures += [
                    _quantile_figure(f"{start}, {name}", share, real, played, LIVE_FLOOR_S, LIVE_BAR)
                    for share in QUANTILES
                ]
    return figures


@contextmanager
def _small_model() -> Iterator[str]:
    """A folder with a Llama of 125 million parameters, whose steps are long beside what a shared machine adds."""
    with tempfile.TemporaryDirectory(prefix="weft-models-") as folder:
        yield str(checkpoints.folder(Path(folder), "small"))


def recorded_runs(folder: Path) -> list[Figure]:
    """vLLM's recorded runs, all that there are."""
    figures = []
    for recording in read_recordings(folder / "cost"):
        say(f"  {recording.name}")
        figures += judge(recording)
    return figures


def judge(recording: Recording) -> list[Figure]:
    """Fit a run's even requests, and compare the quantiles of the odd ones."""
    even = np.arange(len(recording.trace.arrivals)) % 2 == 0
    truth, found = measured(recording), simulated(recording, fit_recording(recording, even))
    figures = []
    for name, real, played, floor in (
        ("time to first token", truth.ttfts_s, found.ttfts_s, FLOOR_S),
        ("mean gap", truth.gaps_s, found.gaps_s, 0.0),
        ("whole answer", truth.ttfts_s + truth.decodes_s, found.ttfts_s + found.decodes_s, 0.0),
    ):
        figures += [
            _quantile_figure(f"{recording.name}, {name}", share, real[~even], played[~even], floor, RECORDED_BAR)
            for share in QUANTILES
        ]
    return figures


def _quantile_figure(name: str, share: float, real: Array, played: Array, floor_s: float, bar: float) -> Figure:
    """The error of a quantile as a share of it; differences below `floor_s` are none."""
    there, here = float(np.quantile(real, share)), float(np.quantile(played, share))
    error = 0.0 if abs(here - there) < floor_s else abs(here / there - 1)
    note = f"measured {there:.4g} s, simulated {here:.4g} s"
    return Figure(f"{name}, p{100 * share:.0f}", 100 * error, "%", 100 * bar, note=note)


def main() -> None:
    """Run what `--only` names."""
    names = ("steps", "mesh", "recorded")
    parser = flags(names, __doc__ or "")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the recorded runs")
    options = parser.parse_args()
    benchmarks: dict[str, Benchmark] = {
        "steps": step_times,
        "mesh": live_mesh,
        "recorded": lambda: recorded_runs(options.traces),
    }
    measure(benchmarks, options)


if __name__ == "__main__":
    main()
