"""Entry point of `python -m lab.engine`."""

from __future__ import annotations

import os
import sys
import time

import lab.engine
from lab.engine.attention import few_runs_against_many, kernels_against_torch
from lab.engine.linears import float_linears, int8_linears
from lab.engine.long_context import long_context
from lab.engine.speculation import speculation
from lab.engine.steps import kernels, libraries, threads, types
from lab.report import Benchmark, Figure, run, say
from weft.up import WORKER_ENVIRON

BENCHMARKS: dict[str, Benchmark] = {
    "float_linears": float_linears,
    "int8_linears": int8_linears,
    "attention": kernels_against_torch,
    "blocks": few_runs_against_many,
    "kernels": kernels,
    "threads": threads,
    "libraries": libraries,
    "types": types,
    "long_context": long_context,
    "speculation": speculation,
}


def timed(name: str, benchmark: Benchmark) -> Benchmark:
    """The same, saying how long it took."""

    def measure() -> list[Figure]:
        started = time.perf_counter()
        figures = benchmark()
        say(f"{name} took {time.perf_counter() - started:.0f} s")
        return figures

    return measure


def become_worker() -> None:
    """Start again, with libraries told what `weft up` tells those of workers: kernels are raced as they will run.

    Benchmarks' own processes are told for themselves.
    """
    if any(os.environ.get(name) != value for name, value in WORKER_ENVIRON.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **WORKER_ENVIRON})
    for name in WORKER_ENVIRON:
        del os.environ[name]


if __name__ == "__main__":
    become_worker()
    run({name: timed(name, benchmark) for name, benchmark in BENCHMARKS.items()}, lab.engine.__doc__ or "")
