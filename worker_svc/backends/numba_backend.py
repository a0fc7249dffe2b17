"""A CPU with kernels that numba compiles for it.

What a step does beside its linears is hundreds of small operations in torch; here it is four kernels a layer, and a
whole step of decodes is one call (`recorded_steps`). Only float32 is worth it: half types a CPU computes with torch,
and so it does what these kernels do not know, latent attention and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker_svc.attention_plan import Family
from worker_svc.backends.backend import Activation, AttentionKind, Batch, HeadShape, Linear
from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.backends.torch_layers import make_linear
from worker_svc.cpu_kernels.attention import AttentionPlan, attend
from worker_svc.cpu_kernels.gated import gated
from worker_svc.cpu_kernels.inputs import embed, turns
from worker_svc.cpu_kernels.int8_linear import HAS_VNNI, TiledInt8Linear
from worker_svc.cpu_kernels.rms_norm import RmsNorm
from worker_svc.cpu_kernels.rotate_and_write import rotate_and_write
from worker_svc.cpu_kernels.rows import take_rows
from worker_svc.cpu_kernels.tiled_linear import TiledLinear, can_tile
from worker_svc.quantization import Weight, as_int8
from worker_svc.step_input import StepInput


@dataclass(frozen=True, slots=True)
class NumbaBackend(TorchBackend):
    """The CPU, in float32."""

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, torch.Tensor) and can_tile(weight):
            return TiledLinear(weight, bias)
        if not isinstance(weight, torch.Tensor) and HAS_VNNI:
            return TiledInt8Linear(as_int8(weight), bias)
        return make_linear(weight, bias, self.dtype)

    def norm(self, weight: torch.Tensor, eps: float) -> RmsNorm:  # type: ignore[override]
        return RmsNorm(weight, eps)

    def plan_attention(self, step: StepInput, families: Sequence[Family], kinds: Sequence[AttentionKind]) -> Any:
        if any(kind.value_dim is not None for kind in kinds):
            return TorchBackend.plan_attention(self, step, families, kinds)
        return {window: AttentionPlan(step, families, window) for window in {kind.window for kind in kinds}}

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
        return attend(q, kv, batch.attention[kind.window], kind)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return take_rows(x, rows)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return gated(gate_up, activation)
