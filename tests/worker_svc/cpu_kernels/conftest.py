"""What tests of the CPU's kernels share."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from numba.core import caching

from worker_svc.cpu_kernels import launch


@pytest.fixture(autouse=True)
def seed(poison: None) -> int:
    """Of a test's random inputs, another one each time; shown when it fails. Outputs that nobody wrote are NaN."""
    chosen = random.randrange(2**31)
    print(f"seed {chosen}")  # noqa: T201
    torch.manual_seed(chosen)
    return chosen


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Threads of every kernel in the test, however small its work is."""
    monkeypatch.setattr(launch, "MIN_VALUES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


@pytest.fixture
def without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder to keep compiled code in: a test's own kernels are made of the source as it is now."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
