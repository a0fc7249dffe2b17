"""When requests are predicted to end, so that what will be left at any time is found at once. Pure.

Admission asks with each request, of another time each. The ends are kept in order, in parts of a bounded size whose
sums are known: a change touches one part, and a question looks at one part and at the sums of those after it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from itertools import chain
from typing import Final, NamedTuple

# A part of twice as many ends is split.
PART_SIZE: Final = 32

End = tuple[float, int]  # monotonic seconds, and the tokens of the request


class Left(NamedTuple):
    """Requests that have not ended."""

    num_requests: int = 0
    num_tokens: int = 0


class Ends:
    """Of requests of one model. Those that are alike are one as good as the other."""

    def __init__(self) -> None:
        # In order, none empty; and of each its last end, and its number of ends and of tokens.
        self._parts: list[list[End]] = []
        self._lasts: list[End] = []
        self._counts: list[int] = []
        self._tokens: list[int] = []

    def __iter__(self) -> Iterator[End]:
        """The earliest first."""
        return chain.from_iterable(self._parts)

    def add(self, end: End) -> None:
        """Mutates self."""
        if not self._parts:
            self._insert(0, [end])
            return
        # The first part that may have it, or the last one.
        place = min(bisect_left(self._lasts, end), len(self._parts) - 1)
        part = self._parts[place]
        insort(part, end)
        self._lasts[place] = part[-1]
        self._counts[place] += 1
        self._tokens[place] += end[1]
        if len(part) >= 2 * PART_SIZE:
            self._delete(place)
            self._insert(place, part[:PART_SIZE])
            self._insert(place + 1, part[PART_SIZE:])

    def remove(self, end: End) -> None:
        """Mutates self. It must be there."""
        place = bisect_left(self._lasts, end)
        part = self._parts[place]
        del part[bisect_left(part, end)]
        self._counts[place] -= 1
        self._tokens[place] -= end[1]
        if part:
            self._lasts[place] = part[-1]
        else:
            self._delete(place)

    def all(self) -> Left:
        """Of whatever time."""
        return Left(sum(self._counts), sum(self._tokens))

    def after(self, at: float) -> Left:
        """Those that end later than this."""
        border = at, float("inf")
        place = bisect_right(self._lasts, border)
        if place == len(self._parts):
            return Left()
        later = self._parts[place][bisect_right(self._parts[place], border) :]
        return Left(
            len(later) + sum(self._counts[place + 1 :]),
            sum([num_tokens for _, num_tokens in later]) + sum(self._tokens[place + 1 :]),
        )

    def _insert(self, place: int, part: list[End]) -> None:
        self._parts.insert(place, part)
        self._lasts.insert(place, part[-1])
        self._counts.insert(place, len(part))
        self._tokens.insert(place, sum(num_tokens for _, num_tokens in part))

    def _delete(self, place: int) -> None:
        del self._parts[place], self._lasts[place], self._counts[place], self._tokens[place]
