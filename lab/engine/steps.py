"""Whole engines, a process each: kernels, threads, what libraries are told at their start, and types."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from lab import bare
from lab.bare import Bare
from lab.engine.models import NANO, SMALL, Shape, folder
from lab.engine.race import Times, race, rivals
from lab.report import Figure, median_figure
from weft.up import WORKER_ENVIRON


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that come together, as peers get them in `lab.peers`."""

    name: str
    num_requests: int
    num_shared: int  # prompt tokens that all of them begin with
    num_own: int
    num_output: int

    def seconds(self, engine: Bare, shape: Shape) -> float:
        """One round on prompts that were never there before."""
        shared = _tokens(shape, self.num_shared)
        prompts = [shared + _tokens(shape, self.num_own) for _ in range(self.num_requests)]
        return engine.seconds(prompts, [self.num_output] * self.num_requests)


# A round of `small` takes seconds.
ROUNDS: Final = {NANO: 5, SMALL: 3}
WARM_UP: Final = Workload("warm-up", 16, 0, 32, 4)
W1: Final = Workload("W1", 1, 0, 128, 128)
W2: Final = Workload("W2", 16, 0, 128, 64)
W3: Final = Workload("W3", 16, 1024, 32, 16)
# Short: a token can take most of a second.
BESIDE: Final = Workload("beside other work", 1, 0, 32, 16)
# What kernels are worth for each.
NANO_BARS: Final = {W1: 1.5, W2: 1.2, W3: 1.1}
SMALL_BARS: Final = {W1: 1.15, W2: 1.1, W3: 1.1}
# 1.5 is what int8 is worth at the least; its first token comes twice as soon.
INT8_BARS: Final = {W1: 1.0, W2: 1.5, W3: 1.0}


def kernels() -> list[Figure]:
    """The backend's own kernels and recorded steps against torch's."""
    figures = []
    for shape, bars in ((NANO, NANO_BARS), (SMALL, SMALL_BARS)):
        with _engines(shape, {"numba": ("--kernels", "numba"), "torch": ("--kernels", "torch")}) as engines:
            figures += _compare(shape, engines, "numba", bars)
    return figures


def threads() -> list[Figure]:
    """As many threads as a step has work for against one."""
    figures = []
    for shape, bar in ((NANO, 0.95), (SMALL, 1.0)):
        with _engines(shape, {"threads as chosen": (), "one thread": ("--threads", "1")}) as engines:
            figures += _compare(shape, engines, "threads as chosen", {W1: bar, W2: bar})
    return figures


def libraries() -> list[Figure]:
    """Spinning and pages as `weft up` sets them for its workers against what libraries do by themselves.

    The bars say that they cost nothing. What they are worth beside other work depends on that work, and has none.
    """
    environs = {"told": WORKER_ENVIRON, "left alone": {}}
    with _engines(SMALL, {"told": (), "left alone": ()}, environs) as engines:
        figures = _compare(SMALL, engines, "told", {W1: 0.95, W2: 0.95})
        with _other_work():
            return figures + _compare(SMALL, engines, "told", {BESIDE: None})


def types() -> list[Figure]:
    """int8 against float32, and how fast both are here."""
    figures = []
    flags = {"int8": ("--dtype", "int8"), "float32": ()}
    for shape in (NANO, SMALL):
        with _engines(shape, flags) as engines:
            for workload in (W1, W2, W3):
                times = _times(shape, engines, workload)
                name = f"{shape.name}, {workload.name}"
                if shape is SMALL:
                    figures += rivals(name, times, "int8", INT8_BARS[workload])
                for kind, seconds in times.items():
                    tokens = workload.num_requests * workload.num_output
                    rates = [tokens / second for second in seconds]
                    figures.append(median_figure(f"{name}, {kind}, the engine alone", rates, "tokens/s"))
    return figures


_DUMMY: Final = ("--load-format", "dummy", "--kv-offload", "never")


@contextmanager
def _engines(
    shape: Shape, flags: Mapping[str, tuple[str, ...]], environs: Mapping[str, Mapping[str, str]] | None = None
) -> Iterator[dict[str, Bare]]:
    """Engines by name, warm, with flags and surroundings of their own."""
    with folder(shape) as path, ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                bare.process("--model", str(path), *_DUMMY, *own, environ=(environs or {}).get(name, WORKER_ENVIRON))
            )
            for name, own in flags.items()
        }
        for engine in engines.values():
            WARM_UP.seconds(engine, shape)
        yield engines


@contextmanager
def _other_work() -> Iterator[None]:
    """A process that always computes."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            yield
        finally:
            child.kill()


def _compare(
    shape: Shape, engines: dict[str, Bare], chosen: str, bars: Mapping[Workload, float | None]
) -> list[Figure]:
    figures = []
    for workload, bar in bars.items():
        times = _times(shape, engines, workload)
        figures += rivals(f"{shape.name}, {workload.name}", times, chosen, bar)
    return figures


def _times(shape: Shape, engines: Mapping[str, Bare], workload: Workload) -> Times:
    rounds = {name: partial(workload.seconds, engine, shape) for name, engine in engines.items()}
    return race(rounds, ROUNDS[shape], is_warm=True)


def _tokens(shape: Shape, count: int) -> list[int]:
    return random.choices(range(shape.vocab_size), k=count)
