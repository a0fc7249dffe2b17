"""What a family of kernels gives `python -m lab.gpu`: what to compile, what to check, what to tune and what to time.

Each of the modules `attention`, `elementwise`, `sampling`, `matmul`, `moe` here has four functions of no argument but
the device: `compile_cases()`, `checks(device)`, `tunings(device)`, `timings(device)`. Inputs are fresh and random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from worker_svc.kernels.tuning import Config


@dataclass(frozen=True, slots=True)
class CompileCase:
    """A kernel as it is compiled for Hopper (sm_90), on a machine with or without a GPU."""

    name: str
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # of each argument in order: "*bf16", "i32", "fp32", "constexpr"
    constants: dict[str, Any]  # of the constexpr arguments
    num_warps: int = 4
    num_stages: int = 3
    aligned: frozenset[str] = frozenset()  # integers that are multiples of 16; pointers all are


@dataclass(frozen=True, slots=True)
class Check:
    """A kernel beside its reference: `run` gives ||out - ref|| / ||ref||, the reference in float64 or float32."""

    name: str
    run: Callable[[], float]
    tolerance: float
    reason: str  # of the tolerance


@dataclass(frozen=True, slots=True)
class Tuning:
    """Candidates for one key of `worker_svc.kernels.tuning`: `make(config)` gives a call to time."""

    kernel: str
    key: str
    candidates: list[Config]
    make: Callable[[Config], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Timing:
    """A call beside its floor and its rivals. The floor: bytes over copy bandwidth, operations over matmul rate."""

    name: str
    make: Callable[[], Callable[[], torch.Tensor | object]]  # builds inputs, and gives the call to time
    num_bytes: int  # each input read once, each output written once
    num_operations: int = 0  # 2 for a multiply-add
    rivals: dict[str, Callable[[], Callable[[], object]]] = field(default_factory=dict)  # by name: torch's own, say
    bar: float | None = None  # least share of the floor, as the issue asks


def compile_case(
    name: str,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    config: Config,
    aligned: Iterable[str] = (),
) -> CompileCase:
    """A case of a kernel whose other arguments, neither in `arguments` nor in `constants`, are None."""
    signature = {argument: arguments.get(argument, "constexpr") for argument in kernel.arg_names}
    nones = {argument: None for argument, kind in signature.items() if kind == "constexpr"}
    constants = nones | config.blocks | constants
    return CompileCase(name, kernel, signature, constants, config.num_warps, config.num_stages, frozenset(aligned))


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||, as `Check` wants it."""
    return float((out.double() - expected.double()).norm() / expected.double().norm())
