"""Latent attention (DeepSeek-V2, Liu et al. 2024): one latent vector a token stands for keys and values of all heads.

    c = norm(W_dkv x), k_r = rope(W_kr x)              cached: [R + P] a token
    q = W_q x, or W_uq norm(W_dq x)                    of each head: N plain channels, P rotated ones
    score of head h = (q_plain W_uk[h]) c + rope(q_rotated) k_r
    value of head h = W_uv[h] (sum of weight * c)

W_uk goes into the query and W_uv after the sum, so that keys and values of heads are never made: attention is that of
one KV head of R + P channels, whose first R are the value. The checkpoint's rotated channels are pairs already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from worker_svc.backends.backend import Backend, Batch, Linear, Norm
from worker_svc.models.builder import Builder, Output
from worker_svc.models.loader import Part
from worker_svc.models.spec import Latent
from worker_svc.rope import Rope

# Of the norms of latents, whatever the config says of the others.
LATENT_NORM_EPS: Final = 1e-6


@dataclass(frozen=True, slots=True)
class QueryBottleneck:
    """Queries by way of a vector of their own."""

    norm: Norm
    up: Linear


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One layer's."""

    backend: Backend
    spec: Latent
    down: Linear  # queries, or their bottleneck, then latent and shared key
    queries: QueryBottleneck | None
    latent_norm: Norm
    key_up: torch.Tensor  # W_uk: [H, N, R]
    value_up: torch.Tensor  # W_uv: [H, R, V]
    output: Output

    def write(
        self, normed: torch.Tensor, kv: torch.Tensor, turns: dict[Rope, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """Put latents and shared keys of all rows into the cache. Returns: the queries, [T, H, R + P]."""
        down = self.down(normed)
        width = self.spec.latent_dim + self.spec.rotary_dim
        queries, latent = down[:, :-width], down[:, -width:]
        if self.queries is not None:
            queries = self.queries.up(self.queries.norm(queries))
        q = self._absorb(queries)
        self.backend.rotate_and_write_latent(q, latent, self.latent_norm, turns[self.spec.rope], kv, batch)
        return q

    def add(self, q: torch.Tensor, residual: torch.Tensor, kv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns: [T, E], `residual` with the attention of these queries added."""
        summed = self.backend.attend(q, kv, self.spec.kind, batch)
        return self.output.add(self._values(summed), residual)

    def _absorb(self, queries: torch.Tensor) -> torch.Tensor:
        """`queries`: [T, H * (N + P)]; returns [T, H, R + P]: W_uk applied to the plain channels."""
        heads = queries.view(len(queries), self.spec.num_heads, -1)
        plain, rotated = heads[..., : self.spec.plain_dim], heads[..., self.spec.plain_dim :]
        absorbed = torch.bmm(plain.transpose(0, 1), self.key_up).transpose(0, 1)
        return torch.cat([absorbed, rotated], dim=2)

    def _values(self, summed: torch.Tensor) -> torch.Tensor:
        """`summed`: [T, H * R]; returns [T, H * V]."""
        latents = summed.view(len(summed), self.spec.num_heads, -1).transpose(0, 1)
        return torch.bmm(latents, self.value_up).transpose(0, 1).flatten(1)


def build_latent_attention(spec: Latent, layer: str, builder: Builder) -> LatentAttention:
    """`layer`: the name of the layer in the checkpoint."""
    name = f"{layer}.self_attn"
    hidden_size, width = builder.spec.hidden_size, spec.latent_dim + spec.rotary_dim
    num_queries = spec.num_heads * (spec.plain_dim + spec.rotary_dim)
    queries = (
        Part(f"{name}.q_proj", num_queries, is_shared=True)
        if spec.query_rank is None
        else Part(f"{name}.q_a_proj", spec.query_rank, has_bias=spec.has_bias)
    )
    latent = Part(f"{name}.kv_a_proj_with_mqa", width, has_bias=spec.has_bias)
    rows = spec.num_heads * (spec.plain_dim + spec.value_dim)
    up = builder.reader.matrix(f"{name}.kv_b_proj", (rows, spec.latent_dim))
    up = up.view(spec.num_heads, spec.plain_dim + spec.value_dim, spec.latent_dim)
    return LatentAttention(
        backend=builder.backend,
        spec=spec,
        down=builder.reader.linear((queries, latent), hidden_size),
        queries=None if spec.query_rank is None else _build_queries(spec.query_rank, num_queries, name, builder),
        latent_norm=builder.norm(f"{name}.kv_a_layernorm", spec.latent_dim, LATENT_NORM_EPS),
        key_up=up[:, : spec.plain_dim].contiguous(),
        value_up=up[:, spec.plain_dim :].transpose(1, 2).contiguous(),
        output=builder.output(
            Part(f"{name}.o_proj", hidden_size, has_bias=spec.has_bias),
            spec.num_heads * spec.value_dim,
            f"{layer}.post_attention_layernorm",
        ),
    )


def _build_queries(rank: int, num_queries: int, name: str, builder: Builder) -> QueryBottleneck:
    return QueryBottleneck(
        builder.norm(f"{name}.q_a_layernorm", rank, LATENT_NORM_EPS),
        builder.reader.linear((Part(f"{name}.q_b_proj", num_queries, is_shared=True),), rank),
    )
