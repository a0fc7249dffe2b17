"""How much memory there is, and how much of it KV blocks get."""

from __future__ import annotations

import contextlib
import math
import mmap
from pathlib import Path
from typing import Final

import torch

from weft.errors import SettingsError

# Fewer blocks could not hold one request worth the name.
MIN_BLOCKS: Final = 4
# What a GPU's KV blocks get if nothing is said: the rest is for the activations of the longest step.
GPU_SHARE: Final = 0.9
# What a CPU's get: this, or if that is more, one longest request, but no more than a share of what is free.
CPU_BYTES: Final = 2**29
CPU_SHARE: Final = 0.5
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def kv_bytes(wanted: int | float, free: int, request_bytes: int, device: torch.device, num_ranks: int = 1) -> int:
    """Bytes for KV blocks of one rank.

    Args:
        wanted: bytes, a share of what is free as a float, or 0 for what suits the device.
        free: bytes, with the weights loaded.
        request_bytes: that one request of the longest context needs of a rank.
        num_ranks: that share what is wanted, and the memory of a CPU.
    """
    if device.type != "cuda":
        free //= num_ranks
    if isinstance(wanted, float):
        return int(wanted * free)
    if wanted:
        return wanted // num_ranks
    if device.type == "cuda":
        return int(GPU_SHARE * free)
    return max(CPU_BYTES // num_ranks, min(request_bytes, int(CPU_SHARE * free)))


def count_blocks(num_bytes: int, block_bytes: int) -> int:
    """KV blocks that fit into `num_bytes`. Raises SettingsError if they are too few for a request."""
    num_blocks = num_bytes // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise SettingsError(
            f"kv_memory: {num_bytes} bytes hold {num_blocks} KV blocks of {block_bytes} bytes, and a worker needs at "
            f"least {MIN_BLOCKS}"
        )
    return num_blocks


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for KV blocks.

    A CPU's is taken page by page, as it is used, up to the size that a worker gets unasked: to clear 512 MiB took 0.2
    to 1.4 s of its start (AMD EPYC, 2026). More is taken at once: if it is not there, that shows at the start, and the
    next worker sees what is left.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes > CPU_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # There may be no huge pages here.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device; on a CPU within the limit of the container, if there is one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = _available(_MEMINFO.read_text()) if _MEMINFO.exists() else 2**32
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _available(meminfo: str) -> int:
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _number(path: Path) -> int | None:
    """What a file of the control group says; None without a file or a limit."""
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)
