"""The workers with room for requests of one model, kept in the orders that policies ask for. Pure.

Placing a request must not look at every worker, of which there may be thousands: the orders are kept up with each
change of one worker, so the first of all, the first of those in a mask, and the spread of loads are found at once.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Final

from scheduler_svc.workers import Worker

# Workers of a mask so few that going through their bits is faster than through an order: so many of any, or this share
# of all. Who holds a prompt's beginning has more to do than others, so the first of them is far down in an order.
MAX_SPARSE_BITS: Final = 16
SPARSE_SHARE: Final = 1 / 8
# Bits of a mask that are found faster one by one than word by word.
FEW_BITS: Final = 4

Key = tuple[Any, ...]


class Pool:
    """Open workers, in three orders, and the same by role; what nobody has asked for yet is not kept up."""

    def __init__(self, workers: Iterable[Worker] = ()) -> None:
        self.mask = 0  # the bits of all
        self._orders: list[Order] = []
        self._own: Order | None = None
        self._loads: list[int] = []
        self._known: dict[str, tuple[Worker, int, str]] = {}  # by name, with load and role as counted
        self._num_of: Counter[str] = Counter()  # workers by role
        self._roles: dict[str, Pool] = {}  # empty unless there were several roles when somebody asked
        for worker in workers:
            self.put(worker)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[Worker]:
        """In no order."""
        return (worker for worker, _, _ in self._known.values())

    def __getitem__(self, name: str) -> Worker:
        """Raises KeyError if it is not there."""
        return self._known[name][0]

    @cached_property
    def by_rank(self) -> Order:
        """The least loaded first."""
        return self._order(lambda worker: worker.rank)

    @cached_property
    def by_queue(self) -> Order:
        """The least to prefill first."""
        return self._order(lambda worker: (worker.waiting_tokens, worker.rank))

    @cached_property
    def by_use(self) -> Order:
        """The longest unused first."""
        return self._order(lambda worker: (worker.last_used, worker.name))

    def by_own(self, key: Callable[[Worker], Key]) -> Order:
        """An order of the policy's own. Only the last one that was asked for is kept up."""
        if self._own is None or self._own.key != key:
            if self._own is not None:
                self._orders.remove(self._own)
            self._own = self._order(key)
        return self._own

    def put(self, worker: Worker) -> None:
        """Add a worker, or find its places anew after it changed. Mutates self."""
        before, role = self._known.get(worker.name), worker.status.role
        known = worker, worker.load, role
        if before != known:
            if before is None:
                self.mask |= 1 << worker.bit
            else:
                self._uncount(*before[1:])
            self._known[worker.name] = known
            self._num_of[role] += 1
            insort(self._loads, worker.load)
        for order in self._orders:
            order.put(worker)
        if self._roles:
            self._roles.setdefault(role, Pool()).put(worker)

    def discard(self, worker: Worker) -> None:
        """Take a worker out, if it is there. Mutates self."""
        before = self._known.pop(worker.name, None)
        if before is not None:
            self.mask &= ~(1 << worker.bit)
            self._uncount(*before[1:])
        for order in self._orders:
            order.discard(worker)
        if worker.status.role in self._roles:
            self._roles[worker.status.role].discard(worker)

    def least(self) -> Worker:
        """The least loaded; there must be one."""
        return self.by_rank.first()

    def loads(self) -> tuple[int, int]:
        """The least and the greatest load, in sequences; there must be one."""
        return self._loads[0], self._loads[-1]

    def of_role(self, role: str) -> Pool:
        """Those of one role."""
        count = self._num_of[role]
        if count == len(self):
            return self
        if not count:
            return self._nobody
        if not self._roles:
            for worker in self:
                self._roles.setdefault(worker.status.role, Pool()).put(worker)
        return self._roles[role]

    @cached_property
    def _nobody(self) -> Pool:
        return Pool()

    def _order(self, key: Callable[[Worker], Key]) -> Order:
        order = Order(key)
        for worker in self:
            order.put(worker)
        self._orders.append(order)
        return order

    def _uncount(self, load: int, role: str) -> None:
        self._num_of[role] -= 1
        del self._loads[bisect_left(self._loads, load)]


class Order:
    """Workers by a key of their own that ends with something that no two share."""

    def __init__(self, key: Callable[[Worker], Key]) -> None:
        self.key = key
        # By place: comparing keys alone is faster than comparing pairs.
        self._sorted: list[Key] = []
        self._workers: list[Worker] = []
        self._by_bit: dict[int, tuple[Key, Worker]] = {}
        self.mask = 0

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def __getitem__(self, place: int) -> Worker:
        return self._workers[place]

    def put(self, worker: Worker) -> None:
        key, before = self.key(worker), self._by_bit.get(worker.bit)
        if before is None:
            self.mask |= 1 << worker.bit
        elif before[0] == key:
            return
        else:
            self._remove(before[0])
        self._by_bit[worker.bit] = key, worker
        place = bisect_left(self._sorted, key)
        self._sorted.insert(place, key)
        self._workers.insert(place, worker)

    def discard(self, worker: Worker) -> None:
        before = self._by_bit.pop(worker.bit, None)
        if before is not None:
            self._remove(before[0])
            self.mask &= ~(1 << worker.bit)

    def first(self, mask: int | None = None) -> Worker:
        """Of all, or of those whose bits are set; there must be one."""
        if mask is None:
            return self._workers[0]
        bits = mask & self.mask
        if self._is_sparse(bits):
            return min(self._sparse(bits))[1]
        # Of a mask of nearly all, one of the first is in it.
        near = (worker for worker in self._workers[:MAX_SPARSE_BITS] if bits >> worker.bit & 1)
        return next(near, None) or next(self._dense(bits))

    def any_of(self, mask: int) -> Worker:
        """Whichever is found first of those whose bits are set; there must be one."""
        bits = mask & self.mask
        return self._by_bit[(bits & -bits).bit_length() - 1][1]

    def within(self, mask: int) -> Iterable[Worker]:
        """Those whose bits are set."""
        bits = mask & self.mask
        return (worker for _, worker in sorted(self._sparse(bits))) if self._is_sparse(bits) else self._dense(bits)

    def _is_sparse(self, bits: int) -> bool:
        count = bits.bit_count()
        return count <= MAX_SPARSE_BITS or count <= SPARSE_SHARE * len(self._workers)

    def _dense(self, bits: int) -> Iterator[Worker]:
        # Looking into a string is faster than shifting a mask of a thousand bits.
        flags = f"{bits:b}"[::-1].ljust(self.mask.bit_length(), "0")
        return (worker for worker in self._workers if flags[worker.bit] == "1")

    def _sparse(self, bits: int) -> Iterator[tuple[Key, Worker]]:
        """In no order."""
        return map(self._by_bit.__getitem__, _numbers(bits))

    def _remove(self, key: Key) -> None:
        place = bisect_left(self._sorted, key)
        del self._sorted[place], self._workers[place]


def _numbers(bits: int) -> list[int]:
    """Of the bits that are set, the lowest first."""
    found, base = [], 0
    if bits.bit_count() > FEW_BITS:
        # Shifting a mask of ten thousand bits for each of them would take as long as the search.
        num_words = -(-bits.bit_length() // 64)
        words: Iterable[int] = struct.unpack(f"<{num_words}Q", bits.to_bytes(8 * num_words, "little"))
    else:
        words = (bits,)
    for word in words:
        while word:
            lowest = word & -word
            found.append(base + lowest.bit_length() - 1)
            word ^= lowest
        base += 64
    return found
