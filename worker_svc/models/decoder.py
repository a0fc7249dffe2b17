"""The forward pass that all families share.

    for each layer:  x += attention(norm(x))
                     x += mlp(norm(x))

What attention and MLP are is the layer's own; sizes and names come from a `DecoderSpec`, weights from a
`WeightReader`, operations from a `Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from worker_svc.backends.backend import Backend, Batch
from worker_svc.models.attention import Attention, read_attention
from worker_svc.models.loader import Asked, Recorder, WeightReader
from worker_svc.models.mlp import GatedMlp, read_mlp
from worker_svc.models.spec import DecoderSpec
from worker_svc.rope import Rope

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Layer:
    attention: Attention
    mlp: GatedMlp


class Decoder:
    """A model with its weights on a device."""

    def __init__(self, spec: DecoderSpec, reader: WeightReader, backend: Backend) -> None:
        """Read and pack all weights."""
        self._backend = backend
        shape = (spec.vocab_size, spec.hidden_size)
        self._embedding = reader.tensor(f"{EMBEDDING}.weight", shape)
        self._layers = [
            Layer(read_attention(spec, index, reader, backend), read_mlp(spec, index, reader, backend))
            for index in range(spec.num_layers)
        ]
        self._norm = backend.norm(reader.tensor(FINAL_NORM, (spec.hidden_size,)), spec.rms_norm_eps)
        self._lm_head = reader.head(LM_HEAD, shape, self._embedding if spec.tie_word_embeddings else None)
        self._frequencies = {rope: backend.frequencies(rope, spec.rotary_dim) for rope in {spec.rope}}

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Compute T tokens, writing their K and V.

        Args:
            kv_cache: [L, heads, N * S, D]; of each layer the heads of K, then those of V.

        Returns:
            Logits of the wanted rows: [rows, V] float32.
        """
        x = F.embedding(batch.token_ids, self._embedding)
        turns = self._turns(batch.positions)
        for layer, kv in zip(self._layers, kv_cache.unbind(0), strict=True):
            x = layer.attention.add(x, kv, turns, batch)
            x = layer.mlp.add(x)
        if batch.logit_rows is not None:
            x = x.index_select(0, batch.logit_rows)
        return self._lm_head(self._norm(x)).float()

    def _turns(self, positions: torch.Tensor) -> dict[Rope, torch.Tensor]:
        return {rope: self._backend.turns(positions, known) for rope, known in self._frequencies.items()}


def asked_by(spec: DecoderSpec, backend: Backend) -> Asked:
    """What a model of this spec asks its weights' source for."""
    recorder = Recorder(backend)
    Decoder(spec, recorder, backend)
    return recorder.asked
