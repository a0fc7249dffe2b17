"""What the ready workers of a model have to do, and do in a second, all together. Pure.

Admission asks with each request, and scaling twice a second, and neither may look at every worker, of which there may
be thousands: the sums are kept up with each change of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from scheduler_svc.workers import Worker
from weft.messages import WorkerStatus

# Rates are summed as whole numbers of tokens in so many seconds, and times in nanoseconds: a sum of floats would drift
# with every change.
_RATE_S: Final = 1000


@dataclass(slots=True)
class Sums:
    """Over several workers."""

    load: int = 0  # sequences held or on their way
    waiting_tokens: int = 0
    num_measured: int = 0  # workers that prefill and have measured how fast
    num_prefilling: int = 0  # workers that prefill, whatever else they do
    num_decoding: int = 0
    prefill_tokens: int = 0  # in _RATE_S, by those that prefill
    decode_tokens: int = 0
    num_loading: int = 0  # workers that have loaded KV blocks from the cache service
    block_load_ns: int = 0  # of all these

    @property
    def block_load_s(self) -> float | None:
        """Seconds that a block takes from the cache service, the mean of the workers that have measured it."""
        return self.block_load_ns / self.num_loading * 1e-9 if self.num_loading else None

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / _RATE_S

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / _RATE_S


class Totals:
    """The ready workers of one model."""

    def __init__(self, workers: Iterable[Worker] = ()) -> None:
        self._workers: dict[str, Worker] = {}
        self._counted: dict[str, tuple[WorkerStatus, int, int]] = {}  # of each worker, its load and tokens as counted
        self._sizes: Counter[int] = Counter()
        self.sums = Sums()
        for worker in workers:
            self.put(worker)

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    @property
    def max_num_seqs(self) -> int:
        """Of the largest worker; 0 if there is none."""
        return max(self._sizes, default=0)

    def put(self, worker: Worker) -> None:
        """Count a worker, or count it anew after it changed. Mutates self."""
        before = self._counted.get(worker.name)
        status, load, waiting_tokens = worker.status, worker.load, worker.waiting_tokens
        self._workers[worker.name] = worker
        self._counted[worker.name] = status, load, waiting_tokens
        if before is None:
            self._count(status, 1)
        else:
            # Most changes are of what was sent to it, of which the status does not speak.
            if before[0] is not status:
                self._count(before[0], -1)
                self._count(status, 1)
            load -= before[1]
            waiting_tokens -= before[2]
        self.sums.load += load
        self.sums.waiting_tokens += waiting_tokens

    def discard(self, worker: Worker) -> None:
        """Count a worker no more, if it is counted. Mutates self."""
        before = self._counted.pop(worker.name, None)
        if before is not None:
            status, load, waiting_tokens = before
            del self._workers[worker.name]
            self._count(status, -1)
            self.sums.load -= load
            self.sums.waiting_tokens -= waiting_tokens

    def is_same(self, other: Totals) -> bool:
        """Whether the other one has counted the same workers alike."""
        return (self._counted, self._sizes, self.sums) == (other._counted, other._sizes, other.sums)

    def _count(self, status: WorkerStatus, times: int) -> None:
        """Add what a status says once, or take it away again."""
        sums = self.sums
        if status.role != "decode":
            sums.num_prefilling += times
            if status.prefill_tokens_per_s > 0:
                sums.num_measured += times
                sums.prefill_tokens += times * round(_RATE_S * status.prefill_tokens_per_s)
        if status.role != "prefill":
            sums.num_decoding += times
            sums.decode_tokens += times * round(_RATE_S * status.decode_tokens_per_s)
        if status.block_load_s > 0:
            sums.num_loading += times
            sums.block_load_ns += times * round(1e9 * status.block_load_s)
        size = status.max_num_seqs
        self._sizes[size] += times
        if not self._sizes[size]:
            del self._sizes[size]
