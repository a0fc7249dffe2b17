"""A CPU with kernels that numba compiles for it, around torch's matrix products and its flash attention.

What a step of few tokens does beside its linears is hundreds of small operations in torch; here it is four kernels a
layer. Only float32 is worth it: half types a CPU computes with torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from worker_svc.attention import attend
from worker_svc.attention_plan import Unit
from worker_svc.backends.backend import Activation, AttentionKind, Batch, HeadShape, Linear
from worker_svc.backends.torch_backend import TorchBackend, Units
from worker_svc.backends.torch_layers import make_linear
from worker_svc.cpu_kernels.gated import gated
from worker_svc.cpu_kernels.inputs import embed, turns
from worker_svc.cpu_kernels.launch import empty_rows
from worker_svc.cpu_kernels.paged_attention import RowPlan, paged_attention
from worker_svc.cpu_kernels.rms_norm import RmsNorm
from worker_svc.cpu_kernels.rotate_and_write import rotate_and_write
from worker_svc.cpu_kernels.tiled_linear import TiledLinear, can_tile
from worker_svc.quantization import Weight
from worker_svc.step_input import StepInput

# Rows of a unit so few that each reading all of its context is faster than matrix products.
MAX_SINGLE_ROWS: Final = 4


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attends to what, for one window."""

    single: RowPlan | None  # rows for our kernel
    units: Sequence[Unit]  # the others


@dataclass(frozen=True, slots=True)
class NumbaBackend(TorchBackend):
    """The CPU, in float32."""

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, torch.Tensor) and can_tile(weight):
            return TiledLinear(weight, bias)
        return make_linear(weight, bias, self.dtype)

    def norm(self, weight: torch.Tensor, eps: float) -> RmsNorm:  # type: ignore[override]
        return RmsNorm(weight, eps)

    def qk_norm(self, q_weight: torch.Tensor, k_weight: torch.Tensor, shape: HeadShape, eps: float) -> RmsNorm:  # type: ignore[override]
        weights = [q_weight.expand(shape.num_heads, -1), k_weight.expand(shape.num_kv_heads, -1)]
        return RmsNorm(torch.cat(weights), eps)

    def make_batch(
        self, step: StepInput, kinds: Iterable[AttentionKind], key_bytes: int, last_tokens: torch.Tensor | None
    ) -> Batch:
        kinds = tuple(kinds)
        batch = TorchBackend.make_batch(self, step, kinds, key_bytes, last_tokens)
        if any(kind.value_dim is not None for kind in kinds):
            return batch
        units: Units = batch.attention
        return replace(batch, attention={window: _plan(known) for window, known in units.items()})

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
        return embed(token_ids, table, scale)

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float) -> torch.Tensor:
        return turns(positions, frequencies, attention_factor)

    def rotate_and_write(  # type: ignore[override]
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        qk_norm: RmsNorm | None,
        turns: torch.Tensor,
        kv: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        if qk_norm is not None:
            qk_norm.norm_(qkv)
        return rotate_and_write(qkv, turns, batch.slots, kv)

    def attend(self, q: torch.Tensor, kv: torch.Tensor, kind: AttentionKind, batch: Batch) -> torch.Tensor:
        if kind.value_dim is not None:
            return TorchBackend.attend(self, q, kv, kind, batch)
        plan: AttentionPlan = batch.attention[kind.window]
        out = empty_rows(len(q), q.shape[1] * q.shape[2])
        if plan.single is not None:
            paged_attention(q, kv, plan.single, out, softmax_scale=kind.softmax_scale, soft_cap=kind.soft_cap)
        if plan.units:
            attend(q, kv, plan.units, kind, out)
        return out

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return gated(gate_up, activation)


def _plan(units: Iterable[Unit]) -> AttentionPlan:
    single: list[Unit] = []
    others: list[Unit] = []
    for unit in units:
        is_single = unit.num_rows <= MAX_SINGLE_ROWS
        (single if is_single else others).append(unit)
    return AttentionPlan(RowPlan(single) if single else None, others)
