"""Every kernel checked, tuned and timed on a GPU, and whole model steps against their floors: `python -m lab.gpu`.

    --compile   only compile every kernel for Hopper, which needs no GPU, and say what each takes
    --tune      measure the candidates of each kernel's block sizes first, and keep the best in worker_svc/kernels/tuned

Without a GPU, kernels are compiled and every figure says "not yet measured". All stages together take less than nine
minutes; one that would begin later is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from lab.report import Conditions, Figure, say

FAMILIES: Final = ("attention", "elementwise", "sampling", "matmul", "moe")
BUDGET_S: Final = 540.0
# Left for the stages after tuning.
AFTER_TUNING_S: Final = 330.0
UNMEASURED: Final = (
    "decode, batch 1: share of the floor | at least 0.85",
    "decode, batch 64 at 1k context: share of the floor | at least 0.8",
    "prefill of 8k tokens: share of the floor | at least 0.65",
    "paged decode attention, batch 64 at 4k: share of copy bandwidth | at least 0.85",
    "prefill attention against torch's flash SDPA | at least 0.6 x",
    "decode attention against torch's SDPA | at least 1 x",
    "decode, batch 1, int4 against bfloat16 | at least 2.5 x",
    "fp8 matmul at M = 4096 against bfloat16 | at least 1.5 x",
    "64 concurrent against transformers continuous batching | at least 3 x",
)


def main() -> int:
    """Returns: 0, or 1 if a kernel does not compile or differs from its reference."""
    options = _flags().parse_args()
    began = time.monotonic()
    if options.compile or not torch.cuda.is_available():
        is_good = _compile(options.only or FAMILIES)
        if not torch.cuda.is_available():
            for line in UNMEASURED:
                sys.stdout.write(f"{line.partition(' | ')[0]} | not yet measured | {line.partition(' | ')[2]}\n")
        return 0 if is_good else 1
    device = torch.device("cuda")
    modules = [import_module(f"lab.gpu.{name}") for name in options.only or FAMILIES]
    is_good = _check(modules, device)
    if options.tune:
        _tune(modules, device, began + BUDGET_S - AFTER_TUNING_S)
    figures = _measure(modules, device, began + BUDGET_S)
    for figure in figures:
        sys.stdout.write(figure.line() + "\n")
    if options.json:
        rows = [{**asdict(figure), "ok": figure.is_ok} for figure in figures]
        options.json.write_text(json.dumps({"conditions": _conditions(), "figures": rows}, indent=1) + "\n")
    return 0 if is_good else 1


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="only compile, for Hopper")
    parser.add_argument("--tune", action="store_true", help="choose block sizes first")
    parser.add_argument("--only", action="append", choices=FAMILIES, help="only this family; may be repeated")
    parser.add_argument("--json", type=Path, help="write figures and conditions to this file")
    return parser


def _conditions() -> dict[str, Any]:
    return {**asdict(Conditions()), "device": torch.cuda.get_device_name()}


def _compile(families: list[str] | tuple[str, ...]) -> bool:
    """Compile all cases; print what each takes."""
    from lab.gpu.compile import Resources, compile_all

    if os.environ.pop("TRITON_INTERPRET", "0") == "1":
        say("TRITON_INTERPRET is set: start without it")
        return False
    found = compile_all(families, os.cpu_count() or 1)
    is_good = True
    for name, result in found.items():
        if isinstance(result, Resources):
            complaint = result.complaint
            size = f"{result.registers} registers, {result.shared_bytes} bytes shared, {result.seconds:.1f} s"
            line = f"{name} | {size} | {complaint or 'ok'}"
        else:
            complaint = result
            line = f"{name} | does not compile: {result}"
        is_good = is_good and not complaint
        sys.stdout.write(line + "\n")
    return is_good


def _check(modules: list[ModuleType], device: torch.device) -> bool:
    is_good = True
    for module in modules:
        for check in module.checks(device):
            error = check.run()
            is_right = error <= check.tolerance
            is_good = is_good and is_right
            line = f"{check.name} | {error:.2e} from its reference | at most {check.tolerance:.1e} ({check.reason})"
            sys.stdout.write(f"{line} | {'ok' if is_right else 'WRONG'}\n")
    return is_good


def _tune(modules: list[ModuleType], device: torch.device, until: float) -> None:
    from lab.gpu import clock
    from worker_svc.kernels import tuning

    best = {}
    for module in modules:
        for case in module.tunings(device):
            if time.monotonic() > until:
                say(f"no time to tune {case.kernel} | {case.key}")
                continue
            times = {}
            for index, config in enumerate(case.candidates):
                try:
                    times[index] = clock.seconds(case.make(config))
                except Exception as error:  # a candidate that does not fit the device is no candidate
                    say(f"{case.kernel} | {case.key} | {config}: {type(error).__name__}")
            if times:
                best[f"{case.kernel} | {case.key}"] = case.candidates[min(times, key=lambda index: times[index])]
    say(f"wrote {tuning.save(device, best)}")


def _measure(modules: list[ModuleType], device: torch.device, until: float) -> list[Figure]:
    from lab.gpu import clock, model

    ceilings = clock.measure_ceilings(device)
    figures = [
        Figure("copy bandwidth", ceilings.bytes_per_s / 1e12, "TB/s"),
        Figure("bfloat16 matmul rate", ceilings.operations_per_s / 1e12, "TFLOP/s"),
    ]
    stages: dict[str, Callable[[], list[Figure]]] = {
        "model steps": lambda: model.step_figures(ceilings),
        "kernels": lambda: [figure for module in modules for figure in _kernel_figures(module, device, ceilings)],
        "serving": model.serving_figures,
    }
    for name, stage in stages.items():
        if time.monotonic() > until:
            say(f"no time for {name}")
            continue
        say(f"{name} …")
        try:
            figures += stage()
        except Exception as error:  # the other stages' figures were paid for
            say(f"{name} failed: {type(error).__name__}: {error}")
    return figures


def _kernel_figures(module: ModuleType, device: torch.device, ceilings: Any) -> list[Figure]:
    from lab.gpu import clock

    figures = []
    for timing in module.timings(device):
        taken = clock.seconds(timing.make())
        floor = ceilings.floor(timing.num_bytes, timing.num_operations)
        rivals = {name: clock.seconds(make()) for name, make in timing.rivals.items()}
        beside = "".join(f", {name} {1e6 * other:.4g} us ({other / taken:.2f} x)" for name, other in rivals.items())
        note = f"{1e6 * taken:.4g} us{beside}"
        figures.append(
            Figure(f"{timing.name}: share of the floor", floor / taken, "", bar=timing.bar, side="least", note=note)
        )
        torch.cuda.empty_cache()
    return figures


if __name__ == "__main__":
    sys.exit(main())
