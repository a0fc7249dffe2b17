"""Block identity: a chain of hashes over content, never over names.

    root    = blake2b(model digest ‖ adapter digest ‖ cache salt)
    hash[0] = blake2b(root ‖ tokens of block 0)
    hash[i] = blake2b(hash[i-1] ‖ tokens of block i)

128 bits each. Equal hashes mean equal tokens and everything before them, under the same weights, for clients that
may share. The tokenizer computes a prompt's chain once; the worker continues it over what it generates.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from weft.messages import BlockHash

HASH_BYTES: Final = 16
# Tokens in a KV block, everywhere: tokenizer, scheduler, worker and cache speak of the same blocks.
BLOCK_SIZE: Final = 16


def chain_root(model_digest: bytes, cache_salt: str = "", adapter_digest: bytes = b"") -> BlockHash:
    """What block 0 is chained to."""
    parts = (model_digest, adapter_digest, cache_salt.encode())
    return BlockHash(
        blake2b(b"".join(len(p).to_bytes(4, "little") + p for p in parts), digest_size=HASH_BYTES).digest()
    )


def next_hash(parent: BlockHash, token_ids: bytes) -> BlockHash:
    """Hash of the block that follows `parent`; `token_ids` is a uint32 column of exactly one block."""
    return BlockHash(blake2b(parent + token_ids, digest_size=HASH_BYTES).digest())


def block_hashes(root: BlockHash, token_ids: bytes, block_size: int = BLOCK_SIZE) -> list[BlockHash]:
    """Hashes of all full blocks of a uint32 column; a last partial block has none."""
    hashes: list[BlockHash] = []
    parent, width = root, 4 * block_size
    for start in range(0, len(token_ids) - width + 1, width):
        parent = next_hash(parent, token_ids[start : start + width])
        hashes.append(parent)
    return hashes
