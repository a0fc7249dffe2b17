"""Rendezvous hashing: even shares, and only the share of what comes or goes moves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from weft.messages import BlockHash
from worker_svc.shards import cache_key, group_by_shard, pick_shard

SHARDS = [f"cache-{i}" for i in range(5)]
KEYS = [cache_key(b"layout", BlockHash(i.to_bytes(16, "big"))) for i in range(4000)]


def test_every_shard_gets_about_its_share() -> None:
    shares = Counter(pick_shard(key, SHARDS) for key in KEYS)
    # A share of 4000 / 5 has a standard deviation of 25: six of them.
    assert all(abs(shares[shard] - 800) < 150 for shard in SHARDS)


@settings(deadline=None)
@given(st.sampled_from(SHARDS))
def test_when_a_shard_goes_only_its_own_keys_move(gone: str) -> None:
    left = [shard for shard in SHARDS if shard != gone]
    for key in KEYS[:500]:
        before = pick_shard(key, SHARDS)
        assert before == gone or pick_shard(key, left) == before


@settings(deadline=None)
@given(st.permutations(SHARDS))
def test_the_order_in_which_shards_are_known_does_not_matter(shards: list[str]) -> None:
    assert all(pick_shard(key, shards) == pick_shard(key, SHARDS) for key in KEYS[:50])


def test_groups_hold_every_key_once_in_order() -> None:
    groups = group_by_shard(KEYS, SHARDS)
    assert sorted(key for keys in groups.values() for key in keys) == sorted(KEYS)
    assert all(keys == sorted(keys, key=KEYS.index) for keys in groups.values())


def test_blocks_of_another_layout_have_other_keys() -> None:
    block_hash = BlockHash(bytes(16))
    assert cache_key(b"float32", block_hash) != cache_key(b"float16", block_hash)
