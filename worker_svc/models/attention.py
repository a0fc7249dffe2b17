"""Attention with grouped queries (Ainslie et al. 2023) and rotary positions.

x + W_o attend(rope(qk_norm(W_qkv norm(x))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from worker_svc import rope
from worker_svc.backends.backend import AttentionKind, Backend, Batch, HeadShape, Linear, Norm
from worker_svc.models.loader import Part, WeightReader
from worker_svc.models.spec import DecoderSpec
from worker_svc.rope import Rope


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's, with its norm."""

    backend: Backend
    shape: HeadShape
    kind: AttentionKind
    rope: Rope
    norm: Norm
    qkv: Linear
    qk_norm: Any  # the backend's own, or None
    output: Linear

    def add(self, x: torch.Tensor, kv: torch.Tensor, turns: dict[Rope, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Returns: [T, E], x with this layer's attention added."""
        qkv = self.qkv(self.norm(x))
        q = self.backend.rotate_and_write(qkv, self.shape, self.qk_norm, turns[self.rope], kv, batch)
        return self.output.add(self.backend.attend(q, kv, self.kind, batch), x)


def read_attention(spec: DecoderSpec, index: int, reader: WeightReader, backend: Backend) -> Attention:
    layer = f"model.layers.{index}"
    name = f"{layer}.self_attn"
    shape = spec.heads
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    parts = (
        Part(f"{name}.q_proj", q, shape.head_dim, shape.rotary_dim),
        Part(f"{name}.k_proj", kv, shape.head_dim, shape.rotary_dim),
        Part(f"{name}.v_proj", kv),
    )
    return Attention(
        backend=backend,
        shape=shape,
        kind=spec.attention_kinds[index],
        rope=spec.rope,
        norm=backend.norm(reader.tensor(f"{layer}.input_layernorm.weight", (spec.hidden_size,)), spec.rms_norm_eps),
        qkv=reader.linear(parts, spec.hidden_size, has_bias=spec.qkv_bias),
        qk_norm=_read_qk_norm(spec, name, reader, backend) if spec.qk_norm else None,
        output=reader.linear((Part(f"{name}.o_proj", spec.hidden_size),), q, has_bias=spec.output_bias),
    )


def _read_qk_norm(spec: DecoderSpec, name: str, reader: WeightReader, backend: Backend) -> Any:
    shape = spec.heads
    order = rope.interleaved_order(1, shape.head_dim, shape.rotary_dim)
    q, k = (reader.tensor(f"{name}.{part}_norm.weight", (shape.head_dim,))[order] for part in ("q", "k"))
    return backend.qk_norm(q, k, shape, spec.rms_norm_eps)
