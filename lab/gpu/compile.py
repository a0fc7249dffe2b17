"""Compile every kernel for Hopper (sm_90), with or without a GPU, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lab.gpu.case import CompileCase

HOPPER: Final = GPUTarget("cuda", 90, 32)
# What one program may have on Hopper.
MAX_SHARED_BYTES: Final = 227 * 1024
_CUOBJDUMP: Final = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes."""

    registers: int  # of each thread
    stack_bytes: int  # of each thread: what did not fit into registers
    shared_bytes: int  # of each program
    seconds: float  # to compile

    @property
    def complaint(self) -> str:
        """Why the kernel cannot be used as it is; empty if it can."""
        if self.stack_bytes:
            return f"spills {self.stack_bytes} bytes a thread"
        if self.shared_bytes > MAX_SHARED_BYTES:
            return f"wants {self.shared_bytes} bytes of shared memory, and a program may have {MAX_SHARED_BYTES}"
        return ""


def compile_all(modules: Iterable[str], processes: int) -> dict[str, Resources | str]:
    """Compile the cases of `lab.gpu.<module>`. Returns: by case, what it takes, or why it does not compile."""
    names = [(module, index) for module in modules for index in range(len(_cases(module)))]
    with ProcessPoolExecutor(processes) as pool:
        return dict(pool.map(_compile, names))


def _cases(module: str) -> list[CompileCase]:
    from importlib import import_module

    cases: list[CompileCase] = import_module(f"lab.gpu.{module}").compile_cases()
    return cases


def _compile(name: tuple[str, int]) -> tuple[str, Resources | str]:
    module, index = name
    case = _cases(module)[index]
    began = time.perf_counter()
    try:
        compiled = compile_for_hopper(case)
    except Exception as error:  # the compiler raises whatever it likes, and the others should still be seen
        return case.name, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    registers, stack = _usage(compiled.asm["cubin"])
    return case.name, Resources(registers, stack, int(compiled.metadata.shared), time.perf_counter() - began)


def compile_for_hopper(case: CompileCase) -> Any:
    """Triton's compiled kernel, whose `asm` holds every stage down to the machine code."""
    constants = {(case.kernel.arg_names.index(name),): value for name, value in case.constants.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(case.signature.items())
        if kind.startswith("*") or name in case.aligned
    }
    source = ASTSource(case.kernel, case.signature, constants, attributes)
    return triton.compile(source, HOPPER, {"num_warps": case.num_warps, "num_stages": case.num_stages})


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {text}")
    return int(found[1]), int(found[2])
