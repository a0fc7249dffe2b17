"""What families write into config.json the same way.

Every function raises `SettingsError`, which names the key that is missing, wrong, or asks for something unknown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from worker_svc.backends.backend import Activation, AttentionKind, HeadShape, Routing
from worker_svc.models.config import ConfigReader
from worker_svc.models.positions import read_rope, read_rotary_dim, rope_section
from worker_svc.models.spec import DecoderSpec, DenseMlp, GroupedQueries, LayerSpec

# Far beyond any model there is; bounds what a hostile config can make us build.
MAX_LAYERS: Final = 1024
MAX_HEADS: Final = 2**14
MAX_HEAD_DIM: Final = 2**14
MAX_EXPERTS: Final = 4096

ACTIVATIONS: Final[dict[str, Activation]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_decoder(config: ConfigReader, layers: list[LayerSpec]) -> DecoderSpec:
    """A decoder of these layers, with nothing out of the ordinary."""
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        layers=tuple(layers),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
    )


def read_num_layers(config: ConfigReader) -> int:
    return config.integer("num_hidden_layers", le=MAX_LAYERS)


def read_attention(config: ConfigReader) -> GroupedQueries:
    """Without biases, norms and window, and with heads rotated as a whole."""
    heads = read_heads(config)
    if heads.rotary_dim != heads.head_dim:
        raise rope_section(config).error("a partial_rotary_factor other than 1 is not known of this architecture")
    return GroupedQueries(heads, AttentionKind(heads.head_dim**-0.5), read_rope(config, heads.rotary_dim))


def read_heads(config: ConfigReader) -> HeadShape:
    num_heads = read_num_heads(config)
    num_kv_heads = config.integer("num_key_value_heads", num_heads, le=MAX_HEADS)
    if num_heads % num_kv_heads:
        raise config.error(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    hidden_size = config.integer("hidden_size")
    if config.config.get("head_dim") is None and hidden_size % num_heads:
        raise config.error(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
    head_dim = config.integer("head_dim", hidden_size // num_heads, le=MAX_HEAD_DIM)
    if head_dim % 2:
        raise config.error(f"head_dim {head_dim} is odd, and rotary positions need pairs")
    return HeadShape(num_heads, num_kv_heads, head_dim, read_rotary_dim(config, head_dim))


def read_num_heads(config: ConfigReader) -> int:
    return config.integer("num_attention_heads", le=MAX_HEADS)


def read_mlp(config: ConfigReader) -> DenseMlp:
    return DenseMlp(config.integer("intermediate_size"), read_activation(config))


def read_activation(config: ConfigReader, key: str = "hidden_act") -> Activation:
    return ACTIVATIONS[config.choice(key, ACTIVATIONS, "silu")]


def with_window(attention: GroupedQueries, window: int | None) -> GroupedQueries:
    return replace(attention, kind=replace(attention.kind, window=window))


def read_qwen_windows(config: ConfigReader) -> list[int | None]:
    """Of each layer: those of `layer_types`, or else of the layers from `max_window_layers` on; or none at all."""
    num_layers = read_num_layers(config)
    if not config.flag("use_sliding_window"):
        return [None] * num_layers
    window = config.integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, ge=0)
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return [window if is_sliding else None for is_sliding in read_sliding_layers(config, default)]


def read_sliding_layers(config: ConfigReader, default: list[str]) -> list[bool]:
    """Of each layer, whether `layer_types` gives it a window. `default`: the types if there is no such key."""
    types: Any = config.config.get("layer_types") or default
    known = ["full_attention", "sliding_attention"]
    if not isinstance(types, list) or len(types) != len(default) or any(kind not in known for kind in types):
        raise config.error(f"layer_types is not a list of {' or '.join(known)} for each of {len(default)} layers")
    return [kind == "sliding_attention" for kind in types]


def read_num_experts(config: ConfigReader, *keys: str) -> int:
    """Under the first of the keys that is there."""
    key = next((key for key in keys if config.config.get(key) is not None), keys[0])
    return config.integer(key, le=MAX_EXPERTS)


def read_routing(config: ConfigReader, num_experts: int, *, is_normalized: bool) -> Routing:
    chosen = config.integer("num_experts_per_tok")
    if chosen > num_experts:
        raise config.error(f"num_experts_per_tok {chosen} is more than the {num_experts} experts")
    return Routing(chosen, is_normalized)
