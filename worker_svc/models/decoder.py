"""The forward pass that all families share, and how its weights are packed from a Hugging Face checkpoint.

    for each layer:  x += W_o attention(rope(qk_norm(W_qkv norm(x))))
                     x += W_down (silu(W_gate norm(x)) * W_up norm(x))

q, k and v are one matrix, gate and up another; q and k are interleaved for `rope.rotate_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from worker_svc.attention import Group, attend
from worker_svc.models import rope
from worker_svc.models.layers import Linear, RmsNorm, make_linear
from worker_svc.models.spec import DecoderSpec
from worker_svc.weights import Checkpoint, Shape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Batch:
    """One step as tensors, made once and used by every layer."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slots: torch.Tensor  # [T] int64: where K and V go
    groups: Mapping[int | None, tuple[Group, ...]]  # what attends to what, for each window that a layer has
    logit_rows: torch.Tensor | None  # int64 rows of [T]; None for all, in order


@dataclass(frozen=True, slots=True)
class Layer:
    """Packed weights of one layer."""

    window: int | None
    attention_norm: RmsNorm
    qkv: Linear
    qk_norm: RmsNorm | None
    output: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear


class Decoder:
    """A model with its weights on a device."""

    def __init__(self, spec: DecoderSpec, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Read and pack all weights.

        Raises:
            SettingsError: the checkpoint does not hold what the spec expects; names the tensors.
        """
        tied = spec.tie_word_embeddings
        checkpoint.check(expected_tensors(spec), frozenset({LM_HEAD}) if tied else frozenset())
        loader = _Loader(spec, checkpoint, dtype, device)
        self._spec = spec
        self._embedding = loader.tensor(EMBEDDING)
        self._layers = [loader.layer(index) for index in range(spec.num_layers)]
        self._norm = loader.norm(FINAL_NORM)
        self._lm_head = make_linear(self._embedding if tied else loader.tensor(LM_HEAD))
        self._frequencies = rope.frequencies(spec.rope, spec.head_dim).to(device)

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Compute T tokens, writing their K and V.

        Args:
            kv_cache: [L, 2 * KH, N * S, D]; the heads of K, then those of V.

        Returns:
            Logits of the wanted rows: [rows, V] float32.
        """
        x = F.embedding(batch.token_ids, self._embedding)
        turns = rope.turns(batch.positions, self._frequencies)
        for layer, kv in zip(self._layers, kv_cache.unbind(0), strict=True):
            attended = self._attend(layer, layer.attention_norm(x), turns, batch, kv)
            x = layer.output.add(attended, x)
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = layer.down.add(F.silu(gate).mul_(up), x)
        if batch.logit_rows is not None:
            x = x.index_select(0, batch.logit_rows)
        return self._lm_head(self._norm(x)).float()

    def _attend(
        self, layer: Layer, x: torch.Tensor, turns: torch.Tensor, batch: Batch, kv: torch.Tensor
    ) -> torch.Tensor:
        spec = self._spec
        rotated = spec.num_heads + spec.num_kv_heads
        heads = layer.qkv(x).view(len(x), rotated + spec.num_kv_heads, spec.head_dim)
        qk = heads[:, :rotated]
        if layer.qk_norm is not None:
            layer.qk_norm.norm_(qk)
        rope.rotate_(qk, turns)
        kv.index_copy_(1, batch.slots, heads[:, spec.num_heads :].transpose(0, 1))
        return attend(heads[:, : spec.num_heads], kv, batch.groups[layer.window])


def expected_tensors(spec: DecoderSpec) -> dict[str, Shape]:
    """Name and shape of every tensor in a checkpoint of this model, as Hugging Face writes it."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (q, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q, spec.output_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    shapes: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not spec.tie_word_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}."
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    return shapes


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads tensors of a checked checkpoint and packs them."""

    spec: DecoderSpec
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str) -> torch.Tensor:
        # A copy in any case: the file's memory goes away with the checkpoint.
        return self.checkpoint.load(name).to(self.device, self.dtype, copy=True)

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.tensor(name), self.spec.rms_norm_eps)

    def layer(self, index: int) -> Layer:
        spec, prefix = self.spec, f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            window=spec.windows[index],
            attention_norm=self.norm(prefix + "input_layernorm.weight"),
            qkv=self._fused([attention + f"{part}_proj" for part in ("q", "k", "v")], spec.qkv_bias, interleaved=2),
            qk_norm=self._qk_norm(attention) if spec.qk_norm else None,
            output=self._fused([attention + "o_proj"], spec.output_bias),
            mlp_norm=self.norm(prefix + "post_attention_layernorm.weight"),
            gate_up=self._fused([mlp + "gate_proj", mlp + "up_proj"], spec.mlp_bias),
            down=self._fused([mlp + "down_proj"], spec.mlp_bias),
        )

    def _fused(self, names: list[str], has_bias: bool, interleaved: int = 0) -> Linear:
        """One layer of several, outputs side by side; the first `interleaved` are heads that get rotated."""
        weight = self._side_by_side([f"{name}.weight" for name in names], interleaved)
        return make_linear(weight, self._side_by_side([f"{n}.bias" for n in names], interleaved) if has_bias else None)

    def _side_by_side(self, names: list[str], interleaved: int) -> torch.Tensor:
        parts = [self.tensor(name) for name in names]
        heads = [rope.interleave(part, self.spec.head_dim) for part in parts[:interleaved]]
        return torch.cat(heads + parts[interleaved:])

    def _qk_norm(self, prefix: str) -> RmsNorm:
        """One norm over the heads of q and k together: weight [H + KH, D]."""
        counts = {"q": self.spec.num_heads, "k": self.spec.num_kv_heads}
        weights = [
            rope.interleave(self.tensor(f"{prefix}{part}_norm.weight"), self.spec.head_dim).expand(count, -1)
            for part, count in counts.items()
        ]
        return RmsNorm(torch.cat(weights), self.spec.rms_norm_eps)
