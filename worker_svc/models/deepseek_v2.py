"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024): latent attention, and experts of which some are shared by all tokens."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.backends.backend import AttentionKind, Routing
from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import (
    MAX_HEAD_DIM,
    read_activation,
    read_decoder,
    read_mlp,
    read_num_experts,
    read_num_heads,
    read_num_layers,
    read_routing,
)
from worker_svc.models.positions import read_rope, rope_section, yarn_magnitude
from worker_svc.models.spec import DecoderSpec, Latent, LayerSpec, Mixture
from worker_svc.rope import Yarn


def read_spec(config: ConfigReader) -> DecoderSpec:
    """The first layers are dense."""
    config = config.with_defaults(q_lora_rank=1536, n_shared_experts=2)
    attention, experts = _read_attention(config), _read_mixture(config)
    dense = replace(read_mlp(config), has_bias=config.flag("mlp_bias"))
    num_dense, num_layers = config.integer("first_k_dense_replace", 0, ge=0), read_num_layers(config)
    layers = [LayerSpec(attention, dense if layer < num_dense else experts) for layer in range(num_layers)]
    return read_decoder(config, layers)


def _read_attention(config: ConfigReader) -> Latent:
    num_heads = read_num_heads(config)
    if config.integer("num_key_value_heads", num_heads) != num_heads:
        raise config.error("num_key_value_heads differs from num_attention_heads, which latent attention cannot have")
    plain, rotary = (config.integer(f"qk_{kind}_head_dim", le=MAX_HEAD_DIM) for kind in ("nope", "rope"))
    latent = config.integer("kv_lora_rank", le=MAX_HEAD_DIM)
    for name, size in (("qk_rope_head_dim", rotary), ("kv_lora_rank", latent)):
        if size % 2:
            raise config.error(f"{name} {size} is odd, and rotary positions need pairs")
    rope = read_rope(config, rotary)
    scale = (plain + rotary) ** -0.5
    if isinstance(rope.scaling, Yarn):
        # Besides what the rotated channels grow by, all scores do.
        scale *= yarn_magnitude(rope.scaling.factor, rope_section(config).optional_number("mscale_all_dim") or 0.0) ** 2
    return Latent(
        num_heads=num_heads,
        latent_dim=latent,
        plain_dim=plain,
        rotary_dim=rotary,
        value_dim=config.integer("v_head_dim", le=MAX_HEAD_DIM),
        query_rank=None if config.config.get("q_lora_rank") is None else config.integer("q_lora_rank"),
        kind=AttentionKind(scale, value_dim=latent),
        rope=rope,
        has_bias=config.flag("attention_bias"),
    )


def _read_mixture(config: ConfigReader) -> Mixture:
    if config.integer("moe_layer_freq", 1) != 1:
        raise config.error(f"moe_layer_freq is {config.config['moe_layer_freq']}, and only 1 is known")
    num_experts = read_num_experts(config, "n_routed_experts")
    size = config.integer("moe_intermediate_size")
    return Mixture(
        num_experts=num_experts,
        intermediate_size=size,
        activation=read_activation(config),
        routing=_read_routing(config, num_experts),
        shared_size=size * config.integer("n_shared_experts", 0, ge=0),
    )


def _read_routing(config: ConfigReader, num_experts: int) -> Routing:
    """Weights are not normalized: DeepSeek's own code and `transformers` differ on what `norm_topk_prob` would mean."""
    config.choice("scoring_func", ("softmax",), "softmax")
    if config.flag("norm_topk_prob"):
        raise config.error("norm_topk_prob is true, which has no agreed meaning for this architecture")
    routing = replace(
        read_routing(config, num_experts, is_normalized=False),
        scale=config.number("routed_scaling_factor", 1.0),
    )
    if config.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "greedy":
        return routing
    num_groups = config.integer("n_group")
    if num_experts % num_groups:
        raise config.error(f"n_routed_experts {num_experts} is no multiple of n_group {num_groups}")
    chosen = config.integer("topk_group", le=num_groups)
    wanted = routing.experts_per_token
    if wanted > chosen * (num_experts // num_groups):
        raise config.error(f"num_experts_per_tok {wanted} is more than topk_group {chosen} groups hold")
    return replace(routing, num_groups=num_groups, groups_per_token=chosen)
