"""Paged attention in plain torch: which sequences attend together, what they see, and the computation.

A step's sequences are put into groups of equally many queries and similar length; each group is one gather of its
keys and values and one call of scaled dot product attention per layer. A decode is a group member with one query, a
prefill chunk one with many. All indices and masks are made once a step.

Keys are gathered by slot, and padding repeats the sequence's own last slot: memory that no sequence owns is never
read, whatever is in it. The cache is head-major, so that what is gathered is contiguous per head: attention to 1000
keys by 16 sequences took 0.9 ms so, and 4.4 ms on keys strided over heads (one thread, AMD EPYC with AVX2, 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from weft.hashing import BLOCK_SIZE
from worker_svc.backends.backend import AttentionKind

# A sequence joins a group while the padded keys (times queries) this wastes cost less than one more group would: about
# 30 us of calls a layer against 0.1 us a key of a small model (one thread, AMD EPYC with AVX2, 2026).
MAX_WASTED_KEYS: Final = 256
# And while the group's keys and values stay in the processor's cache: gathering 16 MiB ran at half the speed of 3 MiB,
# and beyond 32 MiB every allocation takes fresh pages from the system.
MAX_GATHERED_BYTES: Final = 4 * 2**20

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """B sequences with n queries each, attending to up to K keys; rows of the step from `start` to `stop`."""

    start: int
    stop: int
    num_sequences: int
    num_queries: int  # of each
    key_slots: torch.Tensor  # [B * K] int64
    mask: torch.Tensor | None  # [B, 1, n, K], 0 or -inf; None if all see all, or `is_causal`
    is_causal: bool  # the queries are the keys' own tokens, and nothing is padded


def group_sequences(query_lens: Sequence[int], seq_lens: Sequence[int], *, key_bytes: int) -> list[list[int]]:
    """Sequences that attend together, as indices; every sequence is in one group.

    Args:
        key_bytes: of one token's K and V in one layer.
    """
    max_keys = MAX_GATHERED_BYTES // key_bytes
    order = sorted(range(len(query_lens)), key=lambda i: (query_lens[i], seq_lens[i]), reverse=True)
    groups: list[list[int]] = []
    wasted = 0
    for i in order:
        group = groups[-1] if groups else [i]
        longest = seq_lens[group[0]]
        wasted += query_lens[i] * (longest - seq_lens[i])
        is_too_much = wasted > MAX_WASTED_KEYS or (len(group) + 1) * longest > max_keys
        if not groups or query_lens[i] != query_lens[group[0]] or is_too_much:
            groups.append([])
            wasted = 0
        groups[-1].append(i)
    return groups


def plan_group(
    start: int,
    num_queries: int,
    seq_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    *,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Group:
    """Slots and mask of one group.

    Args:
        start: its first row in the step.
        num_queries: of each sequence; they are its last tokens.
        seq_lens: tokens of each sequence after the step.
        window: how many tokens a query sees, itself included; None for all.
    """
    lens = np.asarray(seq_lens, dtype=np.int64)[:, None]
    # The first key that the first query of each sequence sees.
    first = np.zeros_like(lens) if window is None else np.maximum(lens - num_queries - window + 1, 0)
    num_keys = int((lens - first).max())
    positions = first + np.arange(num_keys)  # [B, K]; past a sequence's end for padding
    slots = _slots(block_tables, np.minimum(positions, lens - 1))
    is_causal = bool((lens == num_queries).all()) and (window is None or num_queries <= window)
    mask = None if is_causal else _mask(positions, lens, num_queries, window)
    return Group(
        start=start,
        stop=start + num_queries * len(seq_lens),
        num_sequences=len(seq_lens),
        num_queries=num_queries,
        key_slots=torch.from_numpy(slots.reshape(-1)).to(device),
        mask=None if mask is None else torch.from_numpy(mask).to(device, dtype),
        is_causal=is_causal,
    )


def attend(q: torch.Tensor, kv: torch.Tensor, groups: Sequence[Group], kind: AttentionKind) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over each sequence's keys.

    Args:
        q: [T, H, D]; the groups' rows one after the other.
        kv: [2 * KH, N * S, D]; one layer's cache, K then V, the step's own tokens already in it.

    Returns:
        [T, H * D].
    """
    outputs = [_attend_group(q[group.start : group.stop], kv, group, kind.softmax_scale) for group in groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_group(q: torch.Tensor, kv: torch.Tensor, group: Group, scale: float) -> torch.Tensor:
    num_rows, num_heads, head_dim = q.shape
    count, num_kv_heads = group.num_sequences, len(kv) // 2
    gathered = kv.index_select(1, group.key_slots).view(2, num_kv_heads, count, -1, head_dim)
    keys, values = gathered.transpose(1, 2).unbind(0)  # [B, KH, K, D] each
    if group.num_queries == 1:
        # The heads that share a KV head are as good as queries of one head that see the same keys.
        queries = q.view(count, num_kv_heads, num_heads // num_kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=scale)
        return attended.reshape(num_rows, -1)
    queries = q.view(count, group.num_queries, num_heads, head_dim).transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=group.mask, is_causal=group.is_causal, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2).reshape(num_rows, -1)


def _slots(block_tables: Sequence[Sequence[int]], positions: Indices) -> Indices:
    """Slot of each position. `positions`: [B, K]."""
    width = max(map(len, block_tables))
    tables = np.array([[*table, *[0] * (width - len(table))] for table in block_tables], dtype=np.int64)
    blocks = np.take_along_axis(tables, positions // BLOCK_SIZE, axis=1)
    slots: Indices = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
    return slots


def _mask(positions: Indices, lens: Indices, num_queries: int, window: int | None) -> npt.NDArray[np.float32] | None:
    """0 where a query sees a key, -inf elsewhere: [B, 1, n, K]; None if every query sees every key."""
    queries = (lens - num_queries + np.arange(num_queries))[:, :, None]  # [B, n, 1]
    keys = positions[:, None, :]
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    if seen.all():
        return None
    return np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]
