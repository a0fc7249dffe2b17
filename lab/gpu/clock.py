"""Time on a GPU, and the two ceilings that times are compared with, both measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

# Larger than any cache, so that a copy is of memory.
COPY_BYTES: Final = 2**31
MATMUL_SIZE: Final = 8192
# A timed call is repeated for about so long, in as many samples.
SAMPLE_S: Final = 0.01
NUM_SAMPLES: Final = 7
# Written before each sample: what the last call left in the cache is gone.
FLUSH_BYTES: Final = 2**28


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device can do at most."""

    bytes_per_s: float  # of a copy, read and written
    operations_per_s: float  # of a bfloat16 matmul

    def floor(self, num_bytes: int, num_operations: int) -> float:
        """Seconds below which no version can be."""
        return max(num_bytes / self.bytes_per_s, num_operations / self.operations_per_s)


def measure_ceilings(device: torch.device) -> Ceilings:
    """A large copy, and a large product of random matrices."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source))
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplied = seconds(lambda: a @ b)
    return Ceilings(2 * COPY_BYTES / copied, 2 * MATMUL_SIZE**3 / multiplied)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call: the median of samples, each of calls enough to be timed, replayed as one graph.

    A call that cannot be captured is launched call by call.
    """
    call()
    torch.cuda.synchronize()
    count = max(1, min(200, int(SAMPLE_S / max(_elapsed(call), 1e-6))))
    run = _captured(call, count) or (lambda: [call() for _ in range(count)])
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    samples = []
    for _ in range(NUM_SAMPLES):
        flush.zero_()
        samples.append(_elapsed(run) / count)
    return statistics.median(samples)


def _captured(call: Callable[[], object], count: int) -> Callable[[], object] | None:
    """`count` calls as one CUDA graph, so that launches do not count; None if they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _elapsed(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
