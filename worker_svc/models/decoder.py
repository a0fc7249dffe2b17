"""The forward pass that all families share.

    for each layer:  x += attention(norm(x))
                     x += mlp(norm(x))

What attention and MLP are is the layer's own; sizes and names come from a `DecoderSpec`, weights from a
`WeightReader`, operations from a `Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker_svc.backends.backend import Backend, Batch, Norm
from worker_svc.models.attention import Attention, build_attention
from worker_svc.models.builder import Builder
from worker_svc.models.loader import Asked, Recorder, WeightReader
from worker_svc.models.mla import LatentAttention, build_latent_attention
from worker_svc.models.mlp import GatedMlp, build_mlp
from worker_svc.models.moe import MixtureOfExperts, build_mixture
from worker_svc.models.spec import DecoderSpec, DenseMlp, GroupedQueries, LayerSpec
from worker_svc.rope import Rope

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Norm
    attention: Attention | LatentAttention
    mlp_norm: Norm
    mlp: GatedMlp | MixtureOfExperts


class Decoder:
    """A model with its weights on a device."""

    def __init__(self, spec: DecoderSpec, reader: WeightReader, backend: Backend) -> None:
        """Read and pack all weights."""
        self._backend = backend
        builder = Builder(spec, reader, backend)
        shape = (spec.vocab_size, spec.hidden_size)
        self._embedding = reader.tensor(f"{EMBEDDING}.weight", shape)
        # Rounded as embeddings are.
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=backend.dtype))
        self._layers = [
            _build_layer(layer, f"model.layers.{index}", builder) for index, layer in enumerate(spec.layers)
        ]
        self._norm = builder.norm(FINAL_NORM, spec.hidden_size)
        self._lm_head = reader.head(LM_HEAD, shape, self._embedding if spec.tie_word_embeddings else None)
        self._logit_soft_cap = spec.logit_soft_cap
        rotary_dims = {layer.attention.rope: layer.attention.rotary_dim for layer in spec.layers}
        self._frequencies = {rope: backend.frequencies(rope, size) for rope, size in rotary_dims.items()}

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Compute T tokens, writing what the cache keeps of them.

        Args:
            kv_cache: [L, heads, N * S, width]; heads and width are the spec's `cache`.

        Returns:
            Logits of the wanted rows: [rows, V] float32.
        """
        x = self._backend.embed(batch.token_ids, self._embedding, self._embedding_scale)
        turns = self._turns(batch.positions)
        for layer, kv in zip(self._layers, kv_cache.unbind(0), strict=True):
            q = layer.attention.write(layer.attention_norm(x), kv, turns, batch)
            if layer is self._layers[-1] and batch.ends is not None:
                # All that other rows leave behind is in the cache now.
                rows, batch = batch.ends.rows, batch.ends.batch
                q, x = self._backend.take_rows(q, rows), self._backend.take_rows(x, rows)
            x = layer.attention.add(q, x, kv, batch)
            x = layer.mlp.add(layer.mlp_norm(x), x)
        if batch.logit_rows is not None:
            x = x.index_select(0, batch.logit_rows)
        return self._capped(self._lm_head(self._norm(x)).float())

    def _turns(self, positions: torch.Tensor) -> dict[Rope, torch.Tensor]:
        return {
            rope: self._backend.turns(positions, known, rope.attention_factor)
            for rope, known in self._frequencies.items()
        }

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = self._logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def asked_by(spec: DecoderSpec, backend: Backend) -> Asked:
    """What a model of this spec asks its weights' source for."""
    recorder = Recorder(backend)
    Decoder(spec, recorder, backend)
    return recorder.asked


def _build_layer(spec: LayerSpec, name: str, builder: Builder) -> Layer:
    size = builder.spec.hidden_size
    mlp_norm = "pre_feedforward_layernorm" if builder.spec.has_post_norms else "post_attention_layernorm"
    return Layer(
        attention_norm=builder.norm(f"{name}.input_layernorm", size),
        attention=(
            build_attention(spec.attention, name, builder)
            if isinstance(spec.attention, GroupedQueries)
            else build_latent_attention(spec.attention, name, builder)
        ),
        mlp_norm=builder.norm(f"{name}.{mlp_norm}", size),
        mlp=(
            build_mlp(spec.mlp, name, f"{name}.mlp", builder)
            if isinstance(spec.mlp, DenseMlp)
            else build_mixture(spec.mlp, name, builder)
        ),
    )
