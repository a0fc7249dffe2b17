"""What sets one decoder apart from another, layer by layer: sizes, biases, norms, rotary frequencies, windows, experts.

All families here are decoders of layers that add attention and then an MLP to what they are given. A family's file
reads its config into a `DecoderSpec`; `decoder.py` computes any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker_svc.backends.backend import Activation, AttentionKind, HeadShape, Routing
from worker_svc.rope import LongRope, Rope


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What every layer keeps of a token."""

    num_heads: int
    width: int
    content: str  # in words: blocks are exchanged with those that keep the same


@dataclass(frozen=True, slots=True)
class GroupedQueries:
    """Attention in which heads of queries share heads of keys and values (Ainslie et al. 2023)."""

    heads: HeadShape
    kind: AttentionKind
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    is_fused: bool = False  # the checkpoint holds q, k and v as one tensor

    @property
    def rotary_dim(self) -> int:
        return self.heads.rotary_dim

    @property
    def cache(self) -> CacheShape:
        return CacheShape(2 * self.heads.num_kv_heads, self.heads.head_dim, f"k ({_turned(self.rope)}) and v")


@dataclass(frozen=True, slots=True)
class Latent:
    """Attention whose keys and values are made of one latent vector a token (DeepSeek-V2, Liu et al. 2024)."""

    num_heads: int
    latent_dim: int
    plain_dim: int  # channels of each query and key that are not rotated
    rotary_dim: int  # those that are; the key's are the same for all heads
    value_dim: int
    query_rank: int | None  # of the queries' own bottleneck; None for none
    kind: AttentionKind
    rope: Rope
    has_bias: bool = False

    @property
    def cache(self) -> CacheShape:
        return CacheShape(1, self.latent_dim + self.rotary_dim, f"latent and shared key ({_turned(self.rope)})")


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """A gated MLP that all tokens pass (Shazeer 2020)."""

    intermediate_size: int
    activation: Activation
    has_bias: bool = False
    is_fused: bool = False  # the checkpoint holds gate and up as one tensor


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a checkpoint calls the router's and the experts' block, and an expert's linears."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Gated MLPs of which each token passes a few."""

    num_experts: int
    intermediate_size: int  # of each
    activation: Activation
    routing: Routing
    names: ExpertNames = ExpertNames()
    shared_size: int = 0  # of the MLP that all tokens pass besides; 0 for none


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: GroupedQueries | Latent
    mlp: DenseMlp | Mixture


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder, but for its weights."""

    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    layers: tuple[LayerSpec, ...]
    tie_word_embeddings: bool
    embedding_scale: float = 1.0
    norm_offset: float = 0.0  # what a checkpoint's norms lack
    has_post_norms: bool = False  # what attention and MLP add is normed as well
    logit_soft_cap: float | None = None  # logits become cap * tanh(logit / cap)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def cache(self) -> CacheShape:
        return self.layers[0].attention.cache

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Of each layer."""
        return tuple(layer.attention.kind for layer in self.layers)


def _turned(rope: Rope) -> str:
    """How rotated channels are kept. Which of LongRope's lists turned them, no digest of a model says."""
    if not isinstance(rope.scaling, LongRope):
        return "interleaved"
    return f"interleaved, {'long' if rope.scaling.is_long else 'short'} factors"
