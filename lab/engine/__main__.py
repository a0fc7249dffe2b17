"""Entry point of `python -m lab.engine`."""

from __future__ import annotations

import lab.engine
from lab.engine.attention import few_runs_against_many, runs_against_gathering
from lab.engine.linears import float_linears, int8_linears
from lab.engine.steps import libraries, threads, types
from lab.report import Benchmark, run

BENCHMARKS: dict[str, Benchmark] = {
    "float_linears": float_linears,
    "int8_linears": int8_linears,
    "attention": runs_against_gathering,
    "blocks": few_runs_against_many,
    "threads": threads,
    "libraries": libraries,
    "types": types,
}

if __name__ == "__main__":
    run(BENCHMARKS, lab.engine.__doc__ or "")
