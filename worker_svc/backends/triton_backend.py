"""A GPU with our own kernels, or their interpreter on a CPU.

A step reaches the device as one copy of bytes (`DeviceStep`). Its rows keep their order, and nothing that is launched
depends on values, only on shapes, so that a step of decodes can be captured as a CUDA graph (`cuda_graphs`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from worker_svc import rope
from worker_svc.backends.backend import Activation, AttentionKind, Batch, Experts, HeadShape, Linear, Norm, Routing
from worker_svc.backends.device_step import DeviceStep
from worker_svc.backends.torch_experts import EveryExpert, route
from worker_svc.backends.torch_layers import embed
from worker_svc.backends.triton_layers import GroupedExperts, TritonNorm, make_linear
from worker_svc.kernels.mla_attention import mla_attention
from worker_svc.kernels.paged_attention import paged_attention
from worker_svc.kernels.rope_kv_write import HeadNorms, rope_kv_write
from worker_svc.kernels.rope_latent_write import rope_latent_write
from worker_svc.kernels.swiglu import swiglu
from worker_svc.quantization import Weight
from worker_svc.step_input import StepInput


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """One device."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return make_linear(weight, bias, self.device, self.dtype)

    def experts(self, weights: Iterable[tuple[Weight, Weight]], activation: Activation) -> Experts:
        known = list(weights)
        floats = [
            (gate_up, down)
            for gate_up, down in known
            if isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor) and not down.is_meta
        ]
        if floats and len(floats) == len(known):
            return GroupedExperts(floats, activation)
        experts = [(self.linear(gate_up, None), self.linear(down, None)) for gate_up, down in known]
        return EveryExpert(experts, lambda gate_up: swiglu(gate_up, activation))

    def norm(self, weight: torch.Tensor, eps: float) -> TritonNorm:
        return TritonNorm(weight, eps)

    def qk_norm(self, q_weight: torch.Tensor, k_weight: torch.Tensor, shape: HeadShape, eps: float) -> HeadNorms:
        return HeadNorms(q_weight, k_weight, eps)

    def frequencies(self, rope_: rope.Rope, rotary_dim: int) -> torch.Tensor:
        return rope.frequencies(rope_, rotary_dim).to(self.device)

    def make_batch(
        self, step: StepInput, kinds: Iterable[AttentionKind], key_bytes: int, last_tokens: torch.Tensor | None
    ) -> Batch:
        is_all = step.logit_rows == list(range(len(step.token_ids)))
        return DeviceStep.of(step, last_tokens, self.device).batch(None if is_all else step.logit_rows)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
        return embed(token_ids, table, scale)

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float) -> torch.Tensor:
        """Returns: [T, P / 2, 2] float32, cosine and sine."""
        return torch.view_as_real(rope.turns(positions, frequencies, attention_factor)).squeeze(1)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        qk_norm: HeadNorms | None,
        turns: torch.Tensor,
        kv: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        return rope_kv_write(qkv, turns, batch.slots, kv, norms=qk_norm)

    def rotate_and_write_latent(
        self, q: torch.Tensor, latent: torch.Tensor, norm: Norm, turns: torch.Tensor, kv: torch.Tensor, batch: Batch
    ) -> None:
        rank = latent.shape[1] - 2 * turns.shape[1]
        rope_latent_write(q, norm(latent[:, :rank]), latent[:, rank:], turns, batch.slots, kv[0])

    def attend(self, q: torch.Tensor, kv: torch.Tensor, kind: AttentionKind, batch: Batch) -> torch.Tensor:
        options: dict[str, Any] = {"softmax_scale": kind.softmax_scale}
        if kind.value_dim is not None:
            return mla_attention(q, kv[0], batch.attention, latent_dim=kind.value_dim, **options).flatten(1)
        attended = paged_attention(q, kv, batch.attention, window=kind.window, soft_cap=kind.soft_cap, **options)
        return attended.view(len(q), -1)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, rows)

    def route(self, logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        return route(logits, routing)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return swiglu(gate_up, activation)
