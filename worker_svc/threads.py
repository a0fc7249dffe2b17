"""How many threads compute a step: as many as it has work for.

Threads meet at the end of every kernel, which takes microseconds while each has a core to itself, and until the
system's next turn while one shares a core with another process. So a small step, of which a step of a small model has
a hundred a second, leaves the cores to the mesh, and a large one, which threads halve, takes them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from worker_svc.step_input import StepInput

# A share of the cores for the mesh's other processes: one of each eight.
CORES_PER_MESH_CORE: Final = 8
# Reading a weight once takes as long as multiplying it with this many rows (one thread in float32, AMD EPYC, 2026).
ROWS_PER_READING: Final = 12
# Products of a weight and a row that one more thread is worth: about 5 ms of one thread. Decodes of 16 sequences of a
# 6M-parameter model took 6.5 ms on one thread and 5.2 ms on two, but 8 and 11 ms beside other busy processes.
PRODUCTS_PER_THREAD: Final = 250_000_000


@dataclass(frozen=True, slots=True)
class Threads:
    """What a model's steps have to do."""

    max_threads: int
    num_weights: int  # that a token is multiplied with
    num_cached: int  # values of a token in the KV cache

    def choose(self, step: StepInput) -> int:
        """Threads for this step."""
        products = self.num_weights * (len(step.token_ids) + ROWS_PER_READING)
        products += self.num_cached * sum(step.seq_lens) * ROWS_PER_READING
        return min(self.max_threads, 1 + products // PRODUCTS_PER_THREAD)


def resolve_threads(threads: int, num_cores: int) -> int:
    """How many threads compute a large step: what is asked for, or with 0 all cores but the mesh's share."""
    return threads or num_cores - num_cores // CORES_PER_MESH_CORE
