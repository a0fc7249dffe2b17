"""Everything in torch: what computes half types on a CPU, and what kernels are compared with.

A step's rows are put into the order of the attention's families (`worker_svc.attention_plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker_svc import rope
from worker_svc.attention import attend
from worker_svc.attention_plan import Family, Unit, find_families, order_rows, plan_units
from worker_svc.backends.backend import Activation, AttentionKind, Batch, HeadShape, Linear, Norm, Routing
from worker_svc.backends.torch_experts import TorchExperts, gated, route
from worker_svc.backends.torch_layers import RmsNorm, embed, make_linear
from worker_svc.quantization import Weight
from worker_svc.step_input import StepInput

# What attends to what, for each window that a layer has.
Units = Mapping[int | None, tuple[Unit, ...]]


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """One device of torch."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return make_linear(weight, bias, self.dtype)

    def experts(self, weights: Iterable[tuple[Weight, Weight]], activation: Activation) -> TorchExperts:
        experts = [(self.linear(gate_up, None), self.linear(down, None)) for gate_up, down in weights]
        return TorchExperts(experts, activation)

    def norm(self, weight: torch.Tensor, eps: float) -> RmsNorm:
        return RmsNorm(weight, eps)

    def qk_norm(self, q_weight: torch.Tensor, k_weight: torch.Tensor, shape: HeadShape, eps: float) -> RmsNorm:
        """One norm over the heads of q and k together."""
        weights = [q_weight.expand(shape.num_heads, -1), k_weight.expand(shape.num_kv_heads, -1)]
        return self.norm(torch.cat(weights), eps)

    def frequencies(self, rope_: rope.Rope, rotary_dim: int) -> torch.Tensor:
        return rope.frequencies(rope_, rotary_dim).to(self.device)

    def make_batch(
        self, step: StepInput, kinds: Iterable[AttentionKind], key_bytes: int, last_tokens: torch.Tensor | None
    ) -> Batch:
        families = find_families(step)
        rows = order_rows(families, step.query_lens)
        columns = (step.token_ids, step.positions, step.slot_mapping)
        inputs = torch.tensor([[column[row] for row in rows] for column in columns], dtype=torch.int64)
        token_ids, positions, slots = inputs.to(self.device).unbind(0)
        row_of = {row: new for new, row in enumerate(rows)}
        if step.pending and last_tokens is not None:
            targets = [row_of[row] for row, _ in step.pending]
            token_ids[targets] = last_tokens[[source for _, source in step.pending]]
        logit_rows = [row_of[row] for row in step.logit_rows]
        is_all = logit_rows == list(range(len(rows)))
        return Batch(
            token_ids,
            positions,
            slots,
            self.plan_attention(step, families, tuple(kinds)),
            None if is_all else torch.tensor(logit_rows, dtype=torch.int64, device=self.device),
        )

    def plan_attention(self, step: StepInput, families: Sequence[Family], kinds: Sequence[AttentionKind]) -> Any:
        """What attends to what, for each window that a layer has; rows are in the order of the families."""
        units: Units = {window: plan_units(families, step, window) for window in {kind.window for kind in kinds}}
        return units

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
        return embed(token_ids, table, scale)

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float) -> torch.Tensor:
        return rope.turns(positions, frequencies, attention_factor)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        qk_norm: RmsNorm | None,
        turns: torch.Tensor,
        kv: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        rotated = shape.num_heads + shape.num_kv_heads
        heads = qkv.view(len(qkv), rotated + shape.num_kv_heads, shape.head_dim)
        qk = heads[:, :rotated]
        if qk_norm is not None:
            qk_norm.norm_(qk)
        rope.rotate_(qk[..., : shape.rotary_dim], turns)
        kv.index_copy_(1, batch.slots, heads[:, shape.num_heads :].transpose(0, 1))
        return heads[:, : shape.num_heads]

    def rotate_and_write_latent(
        self, q: torch.Tensor, latent: torch.Tensor, norm: Norm, turns: torch.Tensor, kv: torch.Tensor, batch: Batch
    ) -> None:
        rank = latent.shape[1] - 2 * turns.shape[-1]
        rope.rotate_(q[..., rank:], turns)
        kept = torch.cat([norm(latent[:, :rank]), latent[:, rank:]], dim=1)
        rope.rotate_(kept[:, None, rank:], turns)
        kv[0].index_copy_(0, batch.slots, kept)

    def attend(self, q: torch.Tensor, kv: torch.Tensor, kind: AttentionKind, batch: Batch) -> torch.Tensor:
        units: Units = batch.attention
        return attend(q, kv, units[kind.window], kind)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, rows)

    def route(self, logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        return route(logits, routing)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return gated(gate_up, activation)
