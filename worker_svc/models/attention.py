"""Attention with grouped queries (Ainslie et al. 2023) and rotary positions.

x + W_o attend(rope(qk_norm(W_qkv norm(x))))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker_svc import rope
from worker_svc.backends.backend import AttentionKind, Backend, Batch, HeadShape, Linear
from worker_svc.models.builder import Builder, Output
from worker_svc.models.loader import Part
from worker_svc.models.spec import GroupedQueries
from worker_svc.rope import Rope


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's."""

    backend: Backend
    shape: HeadShape
    kind: AttentionKind
    rope: Rope
    qkv: Linear
    qk_norm: Any  # the backend's own, or None
    output: Output

    def write(
        self, normed: torch.Tensor, kv: torch.Tensor, turns: dict[Rope, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """Put keys and values of all rows into the cache. Returns: the queries, [T, H, D]."""
        qkv = self.qkv(normed)
        return self.backend.rotate_and_write(qkv, self.shape, self.qk_norm, turns[self.rope], kv, batch)

    def add(self, q: torch.Tensor, residual: torch.Tensor, kv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns: [T, E], `residual` with the attention of these queries added."""
        return self.output.add(self.backend.attend(q, kv, self.kind, batch), residual)


def build_attention(spec: GroupedQueries, layer: str, builder: Builder) -> Attention:
    """`layer`: the name of the layer in the checkpoint."""
    name = f"{layer}.self_attn"
    num_columns = spec.heads.num_heads * spec.heads.head_dim
    output = Part(f"{name}.o_proj", builder.spec.hidden_size, has_bias=spec.output_bias)
    return Attention(
        backend=builder.backend,
        shape=spec.heads,
        kind=spec.kind,
        rope=spec.rope,
        qkv=builder.reader.linear(_qkv_parts(spec, name), builder.spec.hidden_size),
        qk_norm=_build_qk_norm(spec.heads, name, builder) if spec.qk_norm else None,
        output=builder.output(output, num_columns, f"{layer}.post_attention_layernorm"),
    )


def _qkv_parts(spec: GroupedQueries, name: str) -> Sequence[Part]:
    shape = spec.heads
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if spec.is_fused:
        fused, size = f"{name}.qkv_proj", q + 2 * kv
        return (
            Part(fused, q, shape.head_dim, shape.rotary_dim, spec.qkv_bias, 0, size, is_shared=True),
            Part(fused, kv, shape.head_dim, shape.rotary_dim, spec.qkv_bias, q, size, is_shared=True),
            Part(fused, kv, has_bias=spec.qkv_bias, first_row=q + kv, num_tensor_rows=size, is_shared=True),
        )
    return (
        Part(f"{name}.q_proj", q, shape.head_dim, shape.rotary_dim, spec.qkv_bias, is_shared=True),
        Part(f"{name}.k_proj", kv, shape.head_dim, shape.rotary_dim, spec.qkv_bias, is_shared=True),
        Part(f"{name}.v_proj", kv, has_bias=spec.qkv_bias, is_shared=True),
    )


def _build_qk_norm(shape: HeadShape, name: str, builder: Builder) -> Any:
    order = rope.interleaved_order(1, shape.head_dim, shape.rotary_dim)
    q, k = (builder.norm_weight(f"{name}.{part}_norm", shape.head_dim)[order] for part in ("q", "k"))
    return builder.backend.qk_norm(q, k, shape, builder.spec.rms_norm_eps)
