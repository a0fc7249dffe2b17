"""Kernels that numba compiles for the CPU at hand, run by the threads that torch computes with.

An operation of torch costs microseconds before it begins, tens of them when a model's weights have just passed through
the caches, and a step has hundreds; a kernel here does the work of several in one pass. It runs in the OpenMP threads
that wait between torch's own operations, since threads of a second library would fight with those for the cores.

A kernel is a function of one pointer, to integers: the number of rows, sizes, and addresses of tensors.

    @kernel
    def _double(pointer):
        args = arguments(pointer)
        num_rows, size = args[0], args[1]
        x = floats(args[2], (num_rows, size))
        for row in range(thread_number(), num_rows, num_threads()):
            ...

    launch(_double, threads_for(x.numel()), *x.shape, x.data_ptr())

Compiled code is kept beside the source, or in the user's cache where that cannot be written, or where `NUMBA_CACHE_DIR`
says; it counts for as long as no file of this folder changes.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

# The last one counts the pieces of work that were taken.
MAX_ARGUMENTS: Final = 24
# Bytes of a cache line, and of a page, which is also what a way of the first-level cache holds.
LINE: Final = 64
PAGE: Final = 4096
# Below this many values another thread is not worth waiting for.
MIN_VALUES_PER_THREAD: Final = 16 * 1024
# Everything that reorders sums, but nothing that takes NaN or infinity for impossible: a sequence ends by its NaN.
FAST_MATH: Final = {"reassoc", "contract", "arcp", "nsz"}

_Arguments: Final = ctypes.c_int64 * MAX_ARGUMENTS
_OPENMP: Final = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
# Functions of the libraries that torch has loaded. While one of the first runs, no other thread of Python does.
_holding = ctypes.PyDLL(None)
_releasing = ctypes.CDLL(None)
# Whether torch computes with OpenMP, and the system lets its functions be found.
IS_AVAILABLE: Final = all(hasattr(_holding, name) for name in _OPENMP)


class Kernel:
    """A kernel, compiled or found compiled when its address is first asked for: where there is no OpenMP, never."""

    def __init__(self, body: Callable[[Any], None]) -> None:
        """`body`: a function of one pointer."""
        self._body = body

    @cached_property
    def address(self) -> int:
        """Of the code."""
        self._compiled = _compile(self._body)  # keeps the code in memory
        address: int = self._compiled.address
        return address


def kernel(body: Callable[[Any], None]) -> Kernel:
    """Decorator of a function of one pointer that is to be compiled."""
    return Kernel(body)


def _cache_folder() -> Path:
    """Where compiled code is kept, each state of the source apart: numba would look at a kernel's own file only."""
    here = Path(__file__).parent
    digest = blake2b(digest_size=8)
    for path in sorted(here.glob("*.py")):
        digest.update(path.read_bytes())
    if "NUMBA_CACHE_DIR" in os.environ:
        parent = Path(os.environ["NUMBA_CACHE_DIR"])
    else:
        parent = here / "__pycache__" if os.access(here, os.W_OK) else Path.home() / ".cache/weft"
    return parent / f"numba-{digest.hexdigest()}"


numba.config.CACHE_DIR = str(_cache_folder())


def _compile(body: Callable[[Any], None]) -> Any:
    for name in _OPENMP:
        binding.add_symbol(name, ctypes.cast(getattr(_holding, name), ctypes.c_void_p).value)
    options: dict[str, Any] = {"nopython": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    try:
        return numba.cfunc("void(voidptr)", cache=True, **options)(body)
    except RuntimeError:
        # There is no place to keep it.
        return numba.cfunc("void(voidptr)", **options)(body)


@dataclass(slots=True)
class Launches:
    """Kernels to run one after the other, for any number of rows up to that of the tensors they were recorded with."""

    kernels: list[Kernel] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # numbers of rows, as they appeared
    buffers: list[torch.Tensor] = field(default_factory=list)  # what the kernels write
    _table: Any = None  # of each kernel, from the first run on: its address, its arguments', and which size it has

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a buffer that no tensor is in any more: kernels run in order, as tensors come and go."""
        size = math.prod(shape)
        for buffer in self.buffers:
            if buffer.numel() == size and buffer.dtype is dtype and _num_users(buffer) == 1:
                return buffer.view(shape)
        self.buffers.append(torch.empty(size, dtype=dtype))
        return self.buffers[-1].view(shape)

    def note(self, which: Kernel, arguments: Any) -> None:
        """One more kernel."""
        self.kernels.append(which)
        self.arguments.append(arguments)
        if arguments[0] not in self.sizes:
            self.sizes.append(arguments[0])

    def run(self, threads: int, *num_rows: int) -> None:
        """All of them in one call, which other threads of Python do not wait for.

        `num_rows`: for all kernels of the first of `sizes`, of the second, ...; rows beyond stay as they are.
        """
        assert len(num_rows) == len(self.sizes)
        count = len(self.kernels)
        if self._table is None:
            places = [known.address for known in self.kernels] + [ctypes.addressof(known) for known in self.arguments]
            places += [self.sizes.index(known[0]) for known in self.arguments]
            self._table = array("q", places)
        counts = array("q", num_rows)
        values = _Arguments(count, address_of(self._table), address_of(counts))
        _releasing.GOMP_parallel(ctypes.c_void_p(_run_all.address), values, threads, 0)


def _num_users(tensor: torch.Tensor) -> int:
    """Tensors in the same memory, this one included."""
    storage = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1  # of them is `storage`


_recorded: Launches | None = None


def record(body: Callable[[], torch.Tensor]) -> tuple[Launches, torch.Tensor]:
    """Let `body` launch kernels, and note them instead of running them. Returns what it returns as well.

    The launches keep the memory that `empty` gave to `body`, and use it again when no tensor is in it; whatever
    else the kernels read or write, the caller must keep.
    """
    global _recorded
    assert _recorded is None, "a recording within a recording"
    _recorded = launches = Launches()
    try:
        result = body()
    finally:
        _recorded = None
    return launches, result


def launch(which: Kernel, threads: int, num_rows: int, *args: int, is_long: bool = False) -> None:
    """Run a kernel in this many threads, and wait for it; within `record`, note it.

    Args:
        args: of the kernel after `num_rows`, fewer than MAX_ARGUMENTS with it.
        is_long: may take over a millisecond, for which other threads of Python should not wait.
    """
    values = _Arguments(num_rows, *args)
    address = which.address  # compiled when it is recorded, not in the first step
    if _recorded is not None:
        _recorded.note(which, values)
        return
    library = _releasing if is_long else _holding
    library.GOMP_parallel(ctypes.c_void_p(address), values, threads, 0)


def check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError unless the tensor is contiguous, of this shape and type: kernels go wherever they are sent."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
        raise refusal(name, tensor, f"contiguous {dtype} of shape {list(shape)}")


def check_rows(name: str, tensor: torch.Tensor, size: int) -> None:
    """Raises ValueError unless the tensor is [T, size] float32, each row contiguous."""
    shape = tensor.shape
    is_right = len(shape) == 2 and shape[1] == size and tensor.dtype is torch.float32
    # In this order, and with `len(tensor)` nowhere: these calls are as long as the rest of the check.
    if not is_right or not (tensor.is_contiguous() or tensor.stride(1) == 1):
        raise refusal(name, tensor, f"contiguous rows of torch.float32, shape [T, {size}]")


def refusal(name: str, tensor: torch.Tensor, expected: str) -> ValueError:
    """The error for a tensor that a kernel cannot take."""
    found = f"{tensor.dtype} of shape {list(tensor.shape)} and strides {list(tensor.stride())}"
    return ValueError(f"{name}: expected {expected}, got {found}")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor for a kernel to write."""
    return torch.empty(shape, dtype=dtype) if _recorded is None else _recorded.allocate(shape, dtype)


def empty_rows(num_rows: int, size: int) -> torch.Tensor:
    """[num_rows, size] for a kernel to write and a matrix product to read.

    Rows a multiple of 4096 bytes apart would all want the same few places in the first-level cache: products with 2,048
    channels took 1.1 to 1.3 times as long (AMD EPYC with AVX-512, 2026).
    """
    return empty(num_rows, size + LINE // 4)[:, :size] if 4 * size % PAGE == 0 else empty(num_rows, size)


def address_of(values: array[int]) -> int:
    """Where a kernel finds the values, for as long as the array lives and keeps its length."""
    return values.buffer_info()[0]


def threads_for(num_values: int) -> int:
    """Threads for a kernel that passes over this many values once."""
    return max(1, min(torch.get_num_threads(), num_values // MIN_VALUES_PER_THREAD))


def as_argument(value: float) -> int:
    """A number for `number` to read."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


# ---- inside kernels ----

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_barrier = types.ExternalFunction("GOMP_barrier", types.void())


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _call(context: Any, address: Any, argument: Any) -> Any:
    """Call a kernel by its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(args[1], cgutils.voidptr_t)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def take(context: Any, pointer: Any, count: Any) -> Any:
    """The first of this launch's next `count` pieces of work, which no other thread gets.

    Threads that take pieces end together however fast each of them is. With equal shares one waits, and falls asleep.

    Args:
        pointer: the kernel's own.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int64 = ir.IntType(64)
        counter = builder.gep(builder.bitcast(args[0], int64.as_pointer()), [int64(MAX_ARGUMENTS - 1)])
        return builder.atomic_rmw("add", counter, args[1], "monotonic")

    return types.int64(types.voidptr, types.int64), generate


@intrinsic
def number(context: Any, bits: Any) -> Any:
    """The float64 that `as_argument` took."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of two float32, and NaN if one is.

    Loops with this become vector instructions, while those with comparisons stay as they are.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.maximum.f32"), args)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def bounded(context: Any, x: Any, low: Any, high: Any) -> Any:
    """x if it is between two float32, else the nearer of these; NaN of NaN. An instruction each, and no branch."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, low, high = args
        x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for a cache line that will be read soon, into the second-level cache.

    The first-level one can only wait for a few lines at a time: when they went there, attention to 16 contexts of 170
    to 1,000 tokens took 1.25 to 1.3 times as long, and to one of 4,000 1.6 times (AMD EPYC with AVX-512, 2026).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t), int32(0), int32(2), int32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@numba.njit(inline="always")
def arguments(pointer):
    return carray(pointer, MAX_ARGUMENTS, dtype=np.int64)


@numba.njit(inline="always")
def floats(address, shape):
    return carray(_pointer(address), shape, dtype=np.float32)


@numba.njit(inline="always")
def integers(address, shape):
    return carray(_pointer(address), shape, dtype=np.int64)


@kernel
def _run_all(pointer):
    args = arguments(pointer)
    count, num_rows = args[0], integers(args[2], args[0])
    table = integers(args[1], (3, count))
    if thread_number() == 0:
        for i in range(count):
            known = integers(table[1, i], MAX_ARGUMENTS)
            known[0], known[MAX_ARGUMENTS - 1] = num_rows[table[2, i]], 0
    for i in range(count):
        _barrier()
        _call(table[0, i], table[1, i])
