"""What sets one decoder apart from another: sizes, biases, norms, rotary frequencies, windows.

All families here are pre-norm decoders with rotary positions, grouped-query attention and a gated MLP. A family's file
reads its config into a `DecoderSpec`; `decoder.py` computes any of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from weft.errors import SettingsError
from worker_svc.backends.backend import AttentionKind, HeadShape
from worker_svc.models.config import ConfigReader
from worker_svc.rope import Rope

# Far beyond any model there is; bounds what a hostile config can make us build.
MAX_LAYERS: Final = 1024


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What every layer keeps of a token."""

    num_heads: int
    width: int
    content: str  # in words: blocks are exchanged with those that keep the same


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder, but for its weights."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # of each layer: how many tokens a query sees, itself included; None for all
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_dim, self.rotary_dim)

    @property
    def cache(self) -> CacheShape:
        return CacheShape(2 * self.num_kv_heads, self.head_dim, "k (interleaved) and v")

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Of each layer."""
        return tuple(AttentionKind(self.head_dim**-0.5, window) for window in self.windows)


def read_decoder(config: ConfigReader, *, default_head_dim: int | None = None) -> DecoderSpec:
    """What all families write the same way; no biases, no QK norm, every layer sees everything.

    Raises:
        SettingsError: names the key that is missing, wrong, or asks for something unknown.
    """
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise SettingsError(
            f"{config.source}: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if config.config.get("head_dim") is None and default_head_dim is None and hidden_size % num_heads:
        raise SettingsError(
            f"{config.source}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}"
        )
    head_dim = config.integer("head_dim", default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise SettingsError(f"{config.source}: head_dim {head_dim} is odd, and rotary positions need pairs")
    if config.config.get("hidden_act", "silu") != "silu":
        raise SettingsError(f"{config.source}: hidden_act {config.config['hidden_act']!r} is not known; known is silu")
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        windows=(None,) * config.integer("num_hidden_layers", le=MAX_LAYERS),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
    )


def read_rope(config: ConfigReader) -> Rope:
    """Rotary settings from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before)."""
    section = config.section("rope_parameters" if config.config.get("rope_parameters") else "rope_scaling")
    rope_type = section.config.get("rope_type", section.config.get("type", "default"))
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    if config.number("partial_rotary_factor", section.number("partial_rotary_factor", 1.0)) != 1.0:
        raise SettingsError(f"{section.source}: a partial_rotary_factor other than 1 is not supported")
    match rope_type:
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, factor=section.number("factor"))
        case "llama3":
            return _llama3_rope(section, theta, config.integer("max_position_embeddings"))
        case _:
            raise SettingsError(
                f"{section.source}: rope_type {rope_type!r} is not known; known are default, linear, llama3"
            )


def read_windows(config: ConfigReader, spec: DecoderSpec) -> DecoderSpec:
    """The windows of Qwen: `layer_types` says which layers have one, or else those from `max_window_layers` on."""
    if not config.flag("use_sliding_window"):
        return spec
    window = config.integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, ge=0)
    kinds = config.config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(spec.num_layers)
    ]
    windows = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != spec.num_layers or any(kind not in [*windows] for kind in kinds):
        raise SettingsError(
            f"{config.source}: layer_types is not a list of full_attention or sliding_attention "
            f"for each of {spec.num_layers} layers"
        )
    return replace(spec, windows=tuple(windows[kind] for kind in kinds))


def _llama3_rope(section: ConfigReader, theta: float, context: int) -> Rope:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise SettingsError(f"{section.source}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return Rope(
        theta,
        factor=section.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=section.integer("original_max_position_embeddings", context),
    )
