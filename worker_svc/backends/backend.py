"""What a model needs of the machine it runs on: linears, norms, rotary positions, attention.

A model's code is written once against this; a backend computes it with what its device is good at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from worker_svc.quantization import Weight
from worker_svc.rope import Rope
from worker_svc.step_input import StepInput

Activation = Literal["silu", "gelu_tanh"]


class Linear(Protocol):
    """x W^T + bias, for x of shape [T, in]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns: [T, out]."""

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`, in one kernel where there is one; may overwrite `residual`. Returns: [T, out]."""


class Experts(Protocol):
    """Gated MLPs of which each token passes a few: sum of weight * W_down (activation(W_gate x) * W_up x)."""

    def add(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """`residual` with the sum for `x` added; may overwrite `residual`.

        Args:
            x: [T, E]
            expert_ids, weights: [T, k], as `route` gives them.

        Returns:
            [T, E].
        """


class Norm(Protocol):
    """Root mean square norm over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [T, E]; returns the same shape."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of an attention layer with grouped queries."""

    num_heads: int  # H, of queries
    num_kv_heads: int  # KH
    head_dim: int  # D
    rotary_dim: int  # the first channels of each head, which get rotated


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """What a query sees and how scores become weights."""

    softmax_scale: float
    window: int | None = None  # tokens a query sees, itself included; None for all before it
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    value_dim: int | None = None  # None: values are cached after the keys; else they are the keys' first channels


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a token passes: those of the largest softmax scores."""

    experts_per_token: int
    is_normalized: bool  # the weights of a token's experts add up to `scale`
    scale: float = 1.0  # of the weights
    num_groups: int = 1  # of experts; only those of the groups with the largest scores are chosen from
    groups_per_token: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One step as tensors, made once and used by every layer."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: where K and V go
    attention: Any  # the backend's own plan of what attends to what
    logit_rows: torch.Tensor | None  # int64 rows of [T]; None for all, in order
    ends: Ends | None = None  # of a step whose logits are wanted of some rows only


@dataclass(frozen=True, slots=True)
class Ends:
    """The rows whose logits are wanted, for what the last layer does after K and V are in the cache."""

    rows: torch.Tensor  # [R] int64: where these rows are in the whole batch
    batch: Batch  # of these rows alone


def with_ends(batch: Batch, ends: Batch) -> Batch:
    """A batch whose `logit_rows` are, in their order, the step that `ends` was made of."""
    rows = batch.logit_rows
    assert rows is not None
    if ends.logit_rows is not None:
        # These rows are not in the order of their step.
        rows = rows[ends.logit_rows.argsort()]
    return replace(batch, ends=Ends(rows, ends))


class Backend(Protocol):
    """A device, the type it computes in, and its operations."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    # At load.

    def linear(self, weight: Weight, bias: torch.Tensor | None) -> Linear:
        """`weight`: [out, in], in float on the device, or quantized anywhere; `bias`: [out]."""

    def experts(self, weights: Iterable[tuple[Weight, Weight]], activation: Activation) -> Experts:
        """Of each expert the weights of gate and up, side by side as in `gate`, and of down; each as for `linear`."""

    def norm(self, weight: torch.Tensor, eps: float) -> Norm:
        """`weight`: [E], of the backend's type or float32."""

    def qk_norm(self, q_weight: torch.Tensor, k_weight: torch.Tensor, shape: HeadShape, eps: float) -> Any:
        """Norms of single heads of q and k, for `rotate_and_write`.

        Both weights: [D], in the order of the heads, of a type as for `norm`.
        """

    def frequencies(self, rope: Rope, rotary_dim: int) -> torch.Tensor:
        """What `turns` wants to know of the positions' encoding."""

    # Each step.

    def make_batch(
        self, step: StepInput, kinds: Iterable[AttentionKind], key_bytes: int, last_tokens: torch.Tensor | None
    ) -> Batch:
        """Everything that the layers share, on the device; rows may come in another order than the step's.

        Args:
            key_bytes: of one token in one layer's cache.
            last_tokens: [any] int64; what the step's pending tokens are taken from.
        """

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
        """Rows of a table, times a number; `token_ids`: [T] int64; `table`: [V, E]; returns [T, E]."""

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float) -> torch.Tensor:
        """Rotary angles of a step in the form that `rotate_and_write` wants; turned vectors grow by the factor."""

    def rotate_and_write(
        self, qkv: torch.Tensor, shape: HeadShape, qk_norm: Any, turns: torch.Tensor, kv: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Norm q and k if there is a norm, rotate both, put K and V into the cache.

        Args:
            qkv: [T, (H + 2 * KH) * D]; may be overwritten.
            kv: [2 * KH, N * S, D]; one layer's cache.

        Returns:
            q: [T, H, D].
        """

    def rotate_and_write_latent(
        self, q: torch.Tensor, latent: torch.Tensor, norm: Norm, turns: torch.Tensor, kv: torch.Tensor, batch: Batch
    ) -> None:
        """Norm the latents, rotate the last P channels of q and of the keys beside the latents, fill the cache.

        Args:
            q: [T, H, R + P]; its last channels are rotated in place.
            latent: [T, R + P]; latents, then the keys that all heads share. May be overwritten.
            norm: of latents, [T, R].
            kv: [1, N * S, R + P]; one layer's cache.
        """

    def attend(self, q: torch.Tensor, kv: torch.Tensor, kind: AttentionKind, batch: Batch) -> torch.Tensor:
        """softmax(q k^T * scale) v over what each query sees; `q`: [T, H, D]; returns [T, H * Dv]."""

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Some rows; `x`: [T, ...]; `rows`: [R] int64; returns [R, ...]."""

    def route(self, logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, all different, and their weights: [T, k] each; `logits`: [T, experts] float32."""

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """`activation(gate) * up`; `gate_up`: [T, 2 * inner], gate first; returns [T, inner]."""
