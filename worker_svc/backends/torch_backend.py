"""Everything in torch: the fast path of a CPU, and what kernels are compared with elsewhere.

A step's rows are put into the order of the attention's groups (`worker_svc.attention`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from worker_svc import rope
from worker_svc.attention import Group, attend, group_sequences, plan_group
from worker_svc.backends.backend import Activation, AttentionKind, Batch, HeadShape, Linear
from worker_svc.backends.torch_layers import RmsNorm, make_linear
from worker_svc.quantization import Weight
from worker_svc.step_input import StepInput

# What attends to what, for each window that a layer has.
Groups = Mapping[int | None, tuple[Group, ...]]


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """One device of torch."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return make_linear(weight, bias)

    def norm(self, weight: torch.Tensor, eps: float) -> RmsNorm:
        return RmsNorm(weight, eps)

    def qk_norm(self, q_weight: torch.Tensor, k_weight: torch.Tensor, shape: HeadShape, eps: float) -> RmsNorm:
        """One norm over the heads of q and k together."""
        weights = [q_weight.expand(shape.num_heads, -1), k_weight.expand(shape.num_kv_heads, -1)]
        return RmsNorm(torch.cat(weights), eps)

    def frequencies(self, rope_: rope.Rope, rotary_dim: int) -> torch.Tensor:
        return rope.frequencies(rope_, rotary_dim).to(self.device)

    def make_batch(
        self, step: StepInput, kinds: Iterable[AttentionKind], key_bytes: int, last_tokens: torch.Tensor | None
    ) -> Batch:
        members = group_sequences(step.query_lens, step.seq_lens, key_bytes=key_bytes)
        rows = _row_order(members, step.query_lens)
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
            {window: self._groups(step, members, window) for window in {kind.window for kind in kinds}},
            None if is_all else torch.tensor(logit_rows, dtype=torch.int64, device=self.device),
        )

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        return rope.turns(positions, frequencies)

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

    def attend(self, q: torch.Tensor, kv: torch.Tensor, kind: AttentionKind, batch: Batch) -> torch.Tensor:
        groups: Groups = batch.attention
        return attend(q, kv, groups[kind.window], kind)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        return activated.mul_(up)

    def _groups(self, step: StepInput, members: Sequence[Sequence[int]], window: int | None) -> tuple[Group, ...]:
        starts = accumulate([len(group) * step.query_lens[group[0]] for group in members], initial=0)
        return tuple(
            plan_group(
                start,
                step.query_lens[group[0]],
                [step.seq_lens[i] for i in group],
                [step.block_tables[i] for i in group],
                window=window,
                dtype=self.dtype,
                device=self.device,
            )
            for start, group in zip(starts, members, strict=False)
        )


def _row_order(groups: Sequence[Sequence[int]], query_lens: Sequence[int]) -> list[int]:
    """Rows of the step in the order of the groups' sequences."""
    starts = list(accumulate(query_lens, initial=0))
    return [row for group in groups for i in group for row in range(starts[i], starts[i + 1])]
