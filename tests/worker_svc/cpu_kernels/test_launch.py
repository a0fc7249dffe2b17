"""Kernels run in torch's threads, at once or recorded."""

from __future__ import annotations

import threading
from typing import Any

import numba
import pytest
import torch

from worker_svc.cpu_kernels import launch as module
from worker_svc.cpu_kernels.launch import (
    LINE,
    MIN_VALUES_PER_THREAD,
    arguments,
    as_argument,
    check,
    check_rows,
    empty,
    empty_rows,
    floats,
    kernel,
    launch,
    num_threads,
    number,
    record,
    thread_number,
    threads_for,
)

pytestmark = pytest.mark.usefixtures("without_cache")


@kernel
def _note_threads(pointer):  # type: ignore[no-untyped-def]
    args = arguments(pointer)
    seen = floats(args[1], (args[0], 2))
    for row in range(thread_number(), args[0], num_threads()):
        seen[row, 0] += 1
        seen[row, 1] = thread_number()


@kernel
def _add(pointer):  # type: ignore[no-untyped-def]
    """out = x + a number."""
    args = arguments(pointer)
    x, out, term = floats(args[1], args[0]), floats(args[2], args[0]), number(args[3])
    for row in range(thread_number(), args[0], num_threads()):
        out[row] = x[row] + term


@kernel
def _reverse(pointer):  # type: ignore[no-untyped-def]
    """Each thread reads what others wrote."""
    args = arguments(pointer)
    x, out = floats(args[1], args[0]), floats(args[2], args[0])
    for row in range(thread_number(), args[0], num_threads()):
        out[row] = x[args[0] - 1 - row]


def add(x: torch.Tensor, term: float) -> torch.Tensor:
    out = empty(len(x))
    launch(_add, 2, len(x), x.data_ptr(), out.data_ptr(), as_argument(term))
    return out


def reverse(x: torch.Tensor) -> torch.Tensor:
    out = empty(len(x))
    launch(_reverse, 2, len(x), x.data_ptr(), out.data_ptr())
    return out


def note_threads(num_rows: int, threads: int, *, is_long: bool) -> list[list[float]]:
    seen = torch.zeros(num_rows, 2)
    launch(_note_threads, threads, num_rows, seen.data_ptr(), is_long=is_long)
    return seen.tolist()


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 13, 257])
def test_every_row_is_computed_once_by_its_thread(num_rows: int, threads: int, is_long: bool) -> None:
    expected = [[1.0, row % threads] for row in range(num_rows)]
    assert note_threads(num_rows, threads, is_long=is_long) == expected


@pytest.mark.parametrize("is_long", [False, True])
def test_another_thread_of_python_has_threads_too(is_long: bool) -> None:
    found: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(note_threads(13, 2, is_long=is_long)))
        thread.start()
        found.append(note_threads(13, 2, is_long=is_long))
        thread.join()
    assert found == [[[1.0, row % 2] for row in range(13)]] * 6


@pytest.mark.parametrize("value", [0.1, -1e-300, 0.0, 3.0, float("-inf")])
def test_numbers_arrive_as_they_were(value: float) -> None:
    assert add(torch.zeros(1), value).item() == torch.tensor(value, dtype=torch.float32).item()


def test_kernel_is_compiled_when_it_is_wanted_and_not_where_openmp_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_holding", object())
    unwanted = kernel(lambda pointer: None)
    with pytest.raises(AttributeError, match=r"GOMP|omp"):
        _ = unwanted.address


def test_kernel_is_compiled_without_a_place_to_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bool] = []
    make = numba.cfunc

    def spy(signature: str, *, cache: bool = False, **options: Any) -> Any:
        compiled.append(cache)
        return make(signature, cache=cache, **options)

    monkeypatch.setattr(numba, "cfunc", spy)
    assert kernel(lambda pointer: None).address
    assert compiled == [True, False]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_rows", [0, 1, 12, 13])
def test_recorded_launches_give_what_launching_gives_for_fewer_rows_too(num_rows: int, threads: int) -> None:
    x, between = torch.randn(13), torch.randn(13)
    original = x.clone()

    def body() -> torch.Tensor:
        return reverse(add(reverse(add(x, 3.0)), -7.0))

    launches, out = record(body)
    assert len(launches.kernels) == 4 and out.isnan().all()
    x.copy_(between)
    launches.run(threads, num_rows)
    expected = reverse(add(reverse(add(between[:num_rows], 3.0)), -7.0))
    assert out[:num_rows].equal(expected) and out[num_rows:].isnan().all()
    x.copy_(original)
    launches.run(threads, 13)
    assert out.equal(body())


def test_recording_within_a_recording_is_refused_and_ends_with_its_error() -> None:
    def nested() -> torch.Tensor:
        return record(lambda: add(torch.zeros(1), 1.0))[1]

    with pytest.raises(AssertionError, match="within"):
        record(nested)
    assert add(torch.zeros(1), 1.0).item() == 1.0
    assert len(record(lambda: add(torch.zeros(1), 1.0))[0].kernels) == 1


def test_recorded_launches_keep_their_memory_and_use_it_again() -> None:
    ones = torch.ones(4)

    def body() -> torch.Tensor:
        x, held = add(ones, 1.0), add(ones, 2.0).view(2, 2)
        for _ in range(4):
            x = add(x, 1.0)
        return add(x, 0.0) + held.view(4)[0] * 0

    launches, _ = record(body)
    # Of the sum so far, of the one before it, and of what is still held.
    assert len(launches.buffers) == 3
    launches, out = record(lambda: add(add(add(add(ones, 1.0), 1.0), 1.0), 1.0))
    launches.run(1, 4)
    assert out.tolist() == [5.0] * 4


@pytest.mark.parametrize(("size", "stride"), [(1000, 1000), (1024, 1040), (2048, 2064), (512, 512)])
def test_rows_are_never_pages_apart(size: int, stride: int) -> None:
    rows = empty_rows(3, size)
    assert rows.shape == (3, size) and rows.stride() == (stride, 1)
    assert stride == size or stride * 4 % LINE == 0


def test_small_kernels_have_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    sizes = [0, MIN_VALUES_PER_THREAD, 2 * MIN_VALUES_PER_THREAD, 100 * MIN_VALUES_PER_THREAD]
    assert [threads_for(size) for size in sizes] == [1, 1, 2, 4]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 5), torch.zeros(6, 2).t(), torch.zeros(2, 6).double(), torch.zeros(12)],
    ids=["shape", "columns", "float64", "flat"],
)
def test_tensors_that_a_kernel_would_misread_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^table: expected contiguous torch.float32 of shape \[2, 6\], got"):
        check("table", tensor, (2, 6))
    with pytest.raises(ValueError, match=r"^x: expected contiguous rows of torch.float32, shape \[T, 6\], got"):
        check_rows("x", tensor, 6)


def test_rows_may_be_apart_and_tensors_not() -> None:
    rows = torch.zeros(2, 9)[:, :6]
    check_rows("x", rows, 6)
    with pytest.raises(ValueError, match="table"):
        check("table", rows, (2, 6))
    check("slots", torch.zeros(3, dtype=torch.int64), (3,), torch.int64)
