"""How far the simulator is from what it simulates: `python -m lab.validate [--only NAME] [--traces FOLDER]`.

`steps`: the cost formula, fitted to half of a live engine's step times, against the other half. `recorded`: four runs
of vLLM that others recorded; the constants are fitted to every other request's times, and the rest are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from lab.calibrate import BAR, calibrate
from lab.recorded import Array, Recording, fit_recording, measured, read_recordings, simulated
from lab.report import Benchmark, Figure, flags, measure, say
from weft.settings import WorkerSettings, load

TRACES: Final = Path(__file__).parent.parent.parent / "shared" / "traces"
QUANTILES: Final = (0.5, 0.9, 0.99)
# Of a quantile of times. LLMServingSim, whose recordings these are, says 2 % of the gaps, and up to 22 % of the time to
# the first token near idle, so that there a tenth of a second, a step or two, is as good.
RECORDED_BAR: Final = 0.10
FLOOR_S: Final = 0.1


def step_times() -> list[Figure]:
    """A live engine's steps, with the settings of a worker."""
    found = calibrate(load(WorkerSettings, [], {}, prog="lab.validate"))
    note = f"{len(found.errors)} held out, {found.num_fitted} fitted, {found.hardware.what}"
    return [
        Figure("step times held out, mean error", 100 * found.mean_error, "%", 100 * BAR, note=note),
        Figure("step times held out, worst error", 100 * max(found.errors), "%", note=note),
    ]


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
            _quantile_figure(f"{recording.name}, {name}", share, real[~even], played[~even], floor)
            for share in QUANTILES
        ]
    return figures


def _quantile_figure(name: str, share: float, real: Array, played: Array, floor_s: float) -> Figure:
    """The error of a quantile as a share of it; differences below `floor_s` are none."""
    there, here = float(np.quantile(real, share)), float(np.quantile(played, share))
    error = 0.0 if abs(here - there) < floor_s else abs(here / there - 1)
    note = f"recorded {there:.4g} s, simulated {here:.4g} s"
    return Figure(f"{name}, p{100 * share:.0f}", 100 * error, "%", 100 * RECORDED_BAR, note=note)


def main() -> None:
    """Run what `--only` names."""
    names = ("steps", "recorded")
    parser = flags(names, __doc__ or "")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the recorded runs")
    options = parser.parse_args()
    benchmarks: dict[str, Benchmark] = {"steps": step_times, "recorded": lambda: recorded_runs(options.traces)}
    measure(benchmarks, options)


if __name__ == "__main__":
    main()
