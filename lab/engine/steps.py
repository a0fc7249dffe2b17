"""Whole engines, a process each: kernels, threads, what libraries are told at their start, and types."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from lab import bare
from lab.bare import Bare
from lab.engine.models import NANO, SMALL, Shape, folder
from lab.engine.race import race, rivals
from lab.report import Figure, median_figure


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


W1: Final = Workload("W1", 1, 0, 128, 128)
W2: Final = Workload("W2", 16, 0, 128, 64)
W3: Final = Workload("W3", 16, 1024, 32, 16)
# What kernels are worth for each.
NANO_BARS: Final = {W1: 1.0, W2: 1.0, W3: 1.0}
SMALL_BARS: Final = {W1: 1.0, W2: 1.0, W3: 1.0}
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
    """Spinning and pages as `weft up` sets them for its workers against what libraries do by themselves."""
    with (
        folder(SMALL) as path,
        bare.process("--model", str(path), *_DUMMY) as told,
        bare.process("--model", str(path), *_DUMMY, environ={}) as untold,
    ):
        return _compare(SMALL, {"told": told, "left alone": untold}, "told", {W1: 1.0, W2: 1.0})


def types() -> list[Figure]:
    """int8 against float32, and how fast both are here."""
    figures = []
    flags = {"int8": ("--dtype", "int8"), "float32": ()}
    for shape in (NANO, SMALL):
        with _engines(shape, flags) as engines:
            for workload in (W1, W2, W3):
                times = race({name: partial(workload.seconds, engine, shape) for name, engine in engines.items()}, 5)
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
def _engines(shape: Shape, flags: Mapping[str, tuple[str, ...]]) -> Iterator[dict[str, Bare]]:
    """Two engines with flags of their own, by name."""
    (first, first_flags), (second, second_flags) = flags.items()
    with folder(shape) as path:
        common = ("--model", str(path), *_DUMMY)
        with bare.process(*common, *first_flags) as one, bare.process(*common, *second_flags) as other:
            yield {first: one, second: other}


def _compare(shape: Shape, engines: dict[str, Bare], chosen: str, bars: Mapping[Workload, float]) -> list[Figure]:
    figures = []
    for workload, bar in bars.items():
        times = race({name: partial(workload.seconds, engine, shape) for name, engine in engines.items()}, 5)
        figures += rivals(f"{shape.name}, {workload.name}", times, chosen, bar)
    return figures


def _tokens(shape: Shape, count: int) -> list[int]:
    return random.choices(range(shape.vocab_size), k=count)
