"""What the ready workers of a model have to do, and do in a second, all together. Pure.

Admission asks with each request, and scaling twice a second, and neither may look at every worker, of which there may
be thousands: the sums are kept up with each change of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from operator import add, sub
from typing import Final, NamedTuple

from scheduler_svc.workers import Worker

# Rates are summed as whole numbers of tokens in so many seconds, and times in nanoseconds: a sum of floats would drift
# with every change.
_RATE_S: Final = 1000


class Sums(NamedTuple):
    """Of one worker, or of several."""

    load: int = 0  # sequences held or on their way
    waiting_tokens: int = 0
    num_seats: int = 0  # sequences that can be held
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


NOTHING: Final = Sums()


class Totals:
    """The ready workers of one model."""

    def __init__(self, workers: Iterable[Worker] = ()) -> None:
        self._workers: dict[str, Worker] = {}
        self._counted: dict[str, Sums] = {}  # of each worker
        self._sizes: Counter[int] = Counter()
        self.sums = NOTHING
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
        before, after = self._counted.get(worker.name), _sums_of(worker)
        self._workers[worker.name] = worker
        self._counted[worker.name] = after
        if before is None or before.num_seats != after.num_seats:
            self._sizes[after.num_seats] += 1
            self._forget_size(before)
        self._change(before or NOTHING, after)

    def discard(self, worker: Worker) -> None:
        """Count a worker no more, if it is counted. Mutates self."""
        before = self._counted.pop(worker.name, None)
        if before is not None:
            del self._workers[worker.name]
            self._forget_size(before)
            self._change(before, NOTHING)

    def is_same(self, other: Totals) -> bool:
        """Whether the other one has counted the same workers alike."""
        return (self._counted, self._sizes, self.sums) == (other._counted, other._sizes, other.sums)

    def _change(self, before: Sums, after: Sums) -> None:
        self.sums = Sums(*map(add, self.sums, map(sub, after, before)))

    def _forget_size(self, before: Sums | None) -> None:
        if before is not None:
            self._sizes[before.num_seats] -= 1
            if not self._sizes[before.num_seats]:
                del self._sizes[before.num_seats]


def _sums_of(worker: Worker) -> Sums:
    status = worker.status
    prefills, decodes = status.role != "decode", status.role != "prefill"
    return Sums(
        load=worker.load,
        waiting_tokens=worker.waiting_tokens,
        num_seats=status.max_num_seqs,
        num_measured=int(prefills and status.prefill_tokens_per_s > 0),
        num_prefilling=int(prefills),
        num_decoding=int(decodes),
        prefill_tokens=round(_RATE_S * status.prefill_tokens_per_s) if prefills else 0,
        decode_tokens=round(_RATE_S * status.decode_tokens_per_s) if decodes else 0,
        num_loading=int(status.block_load_s > 0),
        block_load_ns=round(1e9 * status.block_load_s),
    )
