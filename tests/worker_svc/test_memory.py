"""How much memory KV blocks get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from weft.errors import SettingsError
from worker_svc import memory
from worker_svc.memory import CPU_BYTES, MIN_BLOCKS, count_blocks, free_bytes, kv_bytes, zeros

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_bytes_are_taken_as_given_and_shares_of_what_is_free(device: torch.device) -> None:
    assert kv_bytes(12345, 100, 10, device) == 12345
    assert kv_bytes(0.25, 8 * GIB, 10, device) == 2 * GIB


def test_gpu_is_filled_and_a_cpu_holds_one_longest_request() -> None:
    assert kv_bytes(0, 100 * GIB, 10, GPU) == 90 * GIB
    assert kv_bytes(0, 100 * GIB, 10, CPU) == CPU_BYTES
    assert kv_bytes(0, 100 * GIB, 3 * GIB, CPU) == 3 * GIB
    assert kv_bytes(0, 4 * GIB, 3 * GIB, CPU) == 2 * GIB


def test_ranks_share_what_is_wanted_and_the_memory_of_a_cpu() -> None:
    assert kv_bytes(12345, 100, 10, GPU, 2) == kv_bytes(12345, 100, 10, CPU, 2) == 6172
    assert kv_bytes(0.25, 8 * GIB, 10, GPU, 2) == 2 * kv_bytes(0.25, 8 * GIB, 10, CPU, 2) == 2 * GIB
    assert kv_bytes(0, 100 * GIB, 10, GPU, 2) == 90 * GIB
    assert kv_bytes(0, 100 * GIB, 10, CPU, 2) == CPU_BYTES // 2


def test_too_few_blocks_for_a_request_are_refused() -> None:
    assert count_blocks(MIN_BLOCKS * 100 + 99, 100) == MIN_BLOCKS
    with pytest.raises(SettingsError, match="kv_memory: 399 bytes hold 3 KV blocks"):
        count_blocks(399, 100)


def test_free_memory_is_bounded_by_the_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    alone = free_bytes(CPU)
    assert alone > GIB // 16
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > GIB // 16
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(CPU) == 2000


def test_a_cpus_default_memory_is_taken_as_it_is_used() -> None:
    before = resident_bytes()
    cache = zeros((CPU_BYTES // 4 // 1024, 1024), torch.float32, CPU)
    assert resident_bytes() - before < CPU_BYTES // 8
    cache[-1] = 1.0
    assert cache[:2].sum() == 0 and cache[-1].sum() == 1024


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
