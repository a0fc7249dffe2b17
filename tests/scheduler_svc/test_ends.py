"""How much will be left at a time: the same as looking at every end says."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.ends import PART_SIZE, End, Ends, Left


def plain(ends: list[End], at: float) -> Left:
    later = [num_tokens for ends_at, num_tokens in ends if ends_at > at]
    return Left(len(later), sum(later))


@given(st.integers(0, 6 * PART_SIZE), st.floats(0, 1), st.integers(0, 2**32))
def test_what_is_left_is_what_ends_later(num_ends: int, share_removed: float, seed: int) -> None:
    chance, ends = random.Random(seed), Ends()
    # Few times, so that many end at once.
    found = [(float(chance.randrange(8)), chance.randrange(4)) for _ in range(num_ends)]
    for end in found:
        ends.add(end)
    chance.shuffle(found)
    num_removed = int(share_removed * num_ends)
    for end in found[:num_removed]:
        ends.remove(end)
    left = found[num_removed:]
    assert list(ends) == sorted(left)
    assert ends.all() == plain(left, -1.0)
    for at in (-1.0, 0.0, 3.0, 3.5, 7.0):
        assert ends.after(at) == plain(left, at)
