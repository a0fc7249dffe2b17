"""Paged attention in torch over the runs of `attention_plan`, in one of two ways.

By scores: those of all parts side by side, one softmax, and one product with V for each part. This takes the fewest
calls, so it is the way of decodes; 16 sequences of 160 tokens took 0.6 ms a layer where gathering their keys and
values took 1.5 ms (12 heads on 4, two threads, AMD EPYC with AVX-512, 2026).

By flash attention (Dao 2023), part by part, put together by the logarithms of their sums. It keeps no scores, so it is
the way of long prefills: 256 queries on 4096 keys took 23 ms and 40 ms by scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from worker_svc.attention_plan import MAX_FEW_ROWS, Part, Unit
from worker_svc.backends.backend import AttentionKind

# Scores of this size still are in the second-level cache when the softmax reads them.
MAX_SCORE_BYTES: Final = 2 * 2**20

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend(
    q: torch.Tensor, kv: torch.Tensor, units: Sequence[Unit], kind: AttentionKind, out: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(cap(q k^T * scale)) v over what each row sees.

    Args:
        q: [T, H, D].
        kv: [heads, N * S, D]; one layer's cache, the step's own tokens already in it.
        units: of all rows, or with `out` of some.
        out: [T, H * Dv] to put the units' rows into.

    Returns:
        [T, H * Dv].
    """
    cache = _split(kv, kind)
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = len(cache.keys)
    # The heads that share a KV head are as good as queries of one head that see the same keys.
    grouped = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scaled = grouped * _number(kind.softmax_scale, q.dtype, q.device)
    shape = (*scaled.shape[:3], cache.values.shape[-1])
    out = q.new_empty(shape) if out is None else out.view(shape)
    for unit in units:
        if unit.num_rows == 1 and len(unit.parts) == 1 and q.dtype == torch.float32:
            _attend_one(scaled[unit.first_row], cache, unit.parts[0], kind.soft_cap, out[unit.first_row])
            continue
        rows = slice(unit.first_row, unit.first_row + unit.num_rows)
        max_rows = max(1, MAX_SCORE_BYTES // (num_heads * unit.num_columns * q.itemsize))
        if unit.num_rows <= min(max_rows, MAX_FEW_ROWS) and len(unit.parts) == 1 and q.dtype == torch.float32:
            _attend_few(scaled[rows], cache, unit.parts[0], kind.soft_cap, out[rows])
            continue
        is_large = unit.num_rows > max_rows or len(unit.parts) == 1 or q.dtype != torch.float32
        if is_large and q.device.type == "cpu" and kind.soft_cap is None and kind.value_dim is None:
            _attend_by_flash(grouped[rows], cache, unit, kind.softmax_scale, out[rows])
            continue
        for piece in unit.cut(max_rows):
            rows = slice(piece.first_row, piece.first_row + piece.num_rows)
            _attend_by_scores(scaled[rows], cache, piece, kind.soft_cap, out[rows])
    return out.view(num_rows, -1)


@dataclass(frozen=True, slots=True)
class _Cache:
    """One layer's."""

    keys: torch.Tensor  # [KH, N * S, D]
    values: torch.Tensor  # [KH, N * S, Dv]
    keys_transposed: torch.Tensor  # [KH, D, N * S]


def _split(kv: torch.Tensor, kind: AttentionKind) -> _Cache:
    if kind.value_dim is not None:
        return _Cache(kv, kv[..., : kind.value_dim], kv.transpose(1, 2))
    keys, values = kv.chunk(2)
    return _Cache(keys, values, keys.transpose(1, 2))


@cache
def _number(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As a tensor: torch makes one of a plain number at every multiplication, which takes longer than that."""
    return torch.tensor(value, dtype=dtype, device=device)


def _attend_one(q: torch.Tensor, cache: _Cache, part: Part, soft_cap: float | None, out: torch.Tensor) -> None:
    """One row on one run. `q`: [KH, G, D], scaled; `out`: [KH, G, Dv]."""
    scores = torch.bmm(q, cache.keys_transposed.narrow(2, part.first_slot, part.num_keys))
    weights = _capped(scores, soft_cap).softmax(-1)
    torch.bmm(weights, cache.values.narrow(1, part.first_slot, part.num_keys), out=out)


def _attend_few(q: torch.Tensor, cache: _Cache, part: Part, soft_cap: float | None, out: torch.Tensor) -> None:
    """A few rows on one run: as one, but for the mask. `q`: [rows, KH, G, D], scaled; `out`: [rows, KH, G, Dv].

    So a few drafted rows cost next to nothing: a step of the 6M-parameter demo took 3.1 ms with one row and with five,
    and 3.5 ms by scores of two runs; one of 16 sequences with three rows each 14.4 ms, and 19.6 ms by scores (one
    thread, AMD EPYC with AVX-512, 2026).
    """
    num_rows, num_kv_heads, group, head_dim = q.shape
    folded = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = _capped(torch.bmm(folded, cache.keys_transposed.narrow(2, part.first_slot, part.num_keys)), soft_cap)
    _hide(scores.view(num_kv_heads, num_rows, group, -1), part)
    attended = torch.bmm(scores.softmax(-1), cache.values.narrow(1, part.first_slot, part.num_keys))
    out.copy_(attended.view(num_kv_heads, num_rows, group, -1).transpose(0, 1))


def _attend_by_scores(q: torch.Tensor, cache: _Cache, unit: Unit, soft_cap: float | None, out: torch.Tensor) -> None:
    """`q`: [rows, KH, G, D], scaled; `out`: [rows, KH, G, Dv]."""
    num_rows, num_kv_heads, group, head_dim = q.shape
    folded = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)  # [KH, rows * G, D]
    scores = q.new_full((num_kv_heads, num_rows, group, unit.num_columns), -torch.inf)
    for part in unit.parts:
        rows, columns = _place(part)
        keys = cache.keys_transposed.narrow(2, part.first_slot, part.num_keys)
        products = _capped(torch.bmm(folded[:, _times(rows, group)], keys), soft_cap)
        products = products.view(num_kv_heads, part.num_rows, group, part.num_keys)
        _hide(products, part)
        scores[:, rows, :, columns] = products
    weights = scores.softmax(-1).flatten(1, 2)
    total = q.new_zeros(num_kv_heads, num_rows * group, cache.values.shape[-1])
    for part in unit.parts:
        rows, columns = _place(part)
        values = cache.values.narrow(1, part.first_slot, part.num_keys)
        total[:, _times(rows, group)] += torch.bmm(weights[:, _times(rows, group), columns], values)
    out.copy_(total.view(num_kv_heads, num_rows, group, -1).transpose(0, 1))


def _attend_by_flash(q: torch.Tensor, cache: _Cache, unit: Unit, scale: float, out: torch.Tensor) -> None:
    """`q`: [rows, KH, G, D]; `out`: [rows, KH, G, D]."""
    num_rows, num_kv_heads, group, head_dim = q.shape
    target = out.permute(1, 2, 0, 3)  # [KH, G, rows, D]
    if len(unit.parts) == 1:
        target.copy_(_flash_part(q, cache, unit.parts[0], scale)[0])
        return
    total = torch.zeros(target.shape)
    log_sums = torch.full(target.shape[:3], -torch.inf)
    for part in unit.parts:
        rows, _ = _place(part)
        attended, log_sum = _flash_part(q[rows], cache, part, scale)
        known = log_sums[:, :, rows]
        total[:, :, rows].lerp_(attended.float(), torch.sigmoid(log_sum - known).unsqueeze(-1))
        known.copy_(torch.logaddexp(known, log_sum))
    target.copy_(total)


def _flash_part(q: torch.Tensor, cache: _Cache, part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows to one run. Returns: [KH, G, rows, D] and the logarithm of its sums, [KH, G, rows] float32."""
    num_rows, num_kv_heads, group, head_dim = q.shape
    keys, values = (t.narrow(1, part.first_slot, part.num_keys) for t in (cache.keys, cache.values))
    if part.is_causal or part.edge is not None:
        is_square = part.is_causal and part.num_keys == part.num_rows
        mask = None if is_square else _mask(part, q)
        keys, values = (t.unsqueeze(1).expand(-1, group, -1, -1) for t in (keys, values))
        attended, log_sums = _flash_attention(
            q.permute(1, 2, 0, 3), keys, values, 0.0, is_square, attn_mask=mask, scale=scale
        )
        return attended, log_sums
    # Without a mask the group's heads are more rows of one product: 1.3 times as fast on 4096 keys.
    folded = q.transpose(0, 1).reshape(1, num_kv_heads, num_rows * group, head_dim)
    attended, log_sums = _flash_attention(folded, keys.unsqueeze(0), values.unsqueeze(0), scale=scale)
    shape = (num_kv_heads, num_rows, group)
    return attended.view(*shape, head_dim).transpose(1, 2), log_sums.view(shape).transpose(1, 2)


def _hide(scores: torch.Tensor, part: Part) -> None:
    """Make -inf of the scores of what rows do not see. `scores`: [KH, rows, G, keys]."""
    if part.is_causal:
        scores[..., -part.num_rows :].add_(_triangle(part.num_rows, scores.dtype, scores.device))
    elif part.edge is not None:
        scores.add_(_mask(part, scores).unsqueeze(1))


@cache
def _triangle(num_rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where row i sees key j <= i, else -inf: [rows, 1, rows]."""
    return torch.full((num_rows, num_rows), -torch.inf, dtype=dtype, device=device).triu_(1).unsqueeze(1)


def _mask(part: Part, like: torch.Tensor) -> torch.Tensor:
    """Of a part whose rows do not see all keys: 0 where one sees a key, else -inf. [rows, keys]."""
    hidden = like.new_full((part.num_rows, part.num_keys), -torch.inf)
    return hidden.triu_(1 + part.num_keys - part.num_rows) if part.edge is None else hidden.tril_(part.edge - 1)


def _capped(scores: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    return scores if soft_cap is None else scores.div_(soft_cap).tanh_().mul_(soft_cap)


def _place(part: Part) -> tuple[slice, slice]:
    """Rows and columns of a part among its unit's."""
    return slice(part.first_row, part.first_row + part.num_rows), slice(part.column, part.column + part.num_keys)


def _times(rows: slice, group: int) -> slice:
    return slice(rows.start * group, rows.stop * group)
