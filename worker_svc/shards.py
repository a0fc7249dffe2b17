"""Which cache instance keeps which block: rendezvous hashing over the instances that are there. Pure.

Each key goes to the instance whose hash with it is highest (Thaler and Ravishankar, 1998): when an instance comes or
goes, only its own share of the keys moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from weft.hashing import HASH_BYTES
from weft.messages import BlockHash


def cache_key(layout: bytes, block_hash: BlockHash) -> bytes:
    """The cache service's key of a block: its content, and how its bytes are laid out."""
    return blake2b(layout + block_hash, digest_size=HASH_BYTES).digest()


def pick_shard(key: bytes, shards: Sequence[str]) -> str:
    """The instance that keeps `key`. Raises ValueError if there is none."""
    if len(shards) == 1:
        return shards[0]
    return max(shards, key=lambda shard: (blake2b(key + shard.encode(), digest_size=8).digest(), shard))


def group_by_shard(keys: Iterable[bytes], shards: Sequence[str]) -> dict[str, list[bytes]]:
    """The keys of each instance, in the order given. Raises ValueError if there are keys but no instance."""
    groups: dict[str, list[bytes]] = {}
    for key in keys:
        groups.setdefault(pick_shard(key, shards), []).append(key)
    return groups
