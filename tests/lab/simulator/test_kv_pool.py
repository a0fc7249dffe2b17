"""lab.simulator.kv_pool: what the store keeps, and how transfers wait for each other."""

from __future__ import annotations

import pytest

from lab.simulator.kv_pool import KvPool, KvSharing
from weft.messages import BlockHash

A, B, C, D = (BlockHash(bytes([i]) * 16) for i in range(4))


def make_pool(capacity_tokens: int | None = None) -> KvPool:
    """Of blocks that take a second."""
    sharing = KvSharing(bytes_per_token=10, capacity_tokens=capacity_tokens, bytes_per_s=160.0, latency_s=0.5)
    return KvPool(sharing, block_size=16)


def test_leading_blocks_are_found_and_nothing_behind_a_gap() -> None:
    pool = make_pool()
    pool.put([A, C])

    assert pool.use([A, B, C]) == 1
    assert pool.use([B]) == 0


def test_the_least_recently_used_block_goes_first() -> None:
    pool = make_pool(capacity_tokens=32)
    pool.put([A, B])
    pool.use([A])
    pool.put([C])

    assert [pool.use([block]) for block in (A, B, C)] == [1, 0, 1]
    assert pool.num_blocks == 2


def test_transfers_to_one_worker_wait_for_each_other_and_to_two_do_not() -> None:
    pool = make_pool()

    assert pool.fetch("w0", 2, 0.0) == pytest.approx(2.5)
    assert pool.fetch("w0", 1, 1.0) == pytest.approx(3.5)
    assert pool.fetch("w1", 1, 1.0) == pytest.approx(2.5)


def test_two_workers_that_fetch_from_a_third_share_its_link() -> None:
    pool = make_pool()

    assert pool.fetch("w0", 2, 0.0, "w2") == pytest.approx(2.5)
    assert pool.fetch("w1", 1, 0.0, "w2") == pytest.approx(3.5)


def test_a_block_is_sent_to_the_store_once() -> None:
    pool = make_pool()

    assert pool.send("w0", [A, B], 0.0) == ([A, B], 2.5)
    assert pool.send("w1", [A, B, C], 0.0) == ([C], 1.5)
    pool.put([A])
    assert pool.send("w0", [A], 9.0) == ([], 9.0)


def test_a_store_of_no_size_takes_nothing() -> None:
    assert make_pool(capacity_tokens=0).send("w0", [A], 1.0) == ([], 1.0)
