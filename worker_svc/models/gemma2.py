"""Gemma 2 (Riviere et al. 2024): norms before and after attention and MLP, a window in every other layer, soft caps."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.backends.backend import AttentionKind
from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import (
    read_activation,
    read_decoder,
    read_heads,
    read_num_layers,
    read_sliding_layers,
    with_window,
)
from worker_svc.models.positions import read_rope
from worker_svc.models.spec import DecoderSpec, DenseMlp, GroupedQueries, LayerSpec
from worker_svc.rope import Rope


def read_spec(config: ConfigReader) -> DecoderSpec:
    config = with_gemma_defaults(config).with_defaults(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    full = read_gemma_attention(config, read_rope(config, read_heads(config).rotary_dim))
    soft_cap = config.optional_number("attn_logit_softcapping")
    full = replace(full, kind=replace(full.kind, soft_cap=soft_cap))
    sliding = with_window(full, config.integer("sliding_window"))
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(read_num_layers(config))]
    return read_gemma_decoder(
        config, [sliding if is_sliding else full for is_sliding in read_sliding_layers(config, types)]
    )


def with_gemma_defaults(config: ConfigReader) -> ConfigReader:
    return config.with_defaults(
        head_dim=256,
        query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=4096,
        tie_word_embeddings=True,
    )


def read_gemma_attention(config: ConfigReader, rope: Rope) -> GroupedQueries:
    """Without window and cap. Scores have a scale of their own, whatever the heads' size."""
    if config.flag("use_bidirectional_attention"):
        raise config.error("use_bidirectional_attention is true, and a token here sees only those before it")
    has_bias = config.flag("attention_bias")
    kind = AttentionKind(config.number("query_pre_attn_scalar") ** -0.5)
    return GroupedQueries(read_heads(config), kind, rope, qkv_bias=has_bias, output_bias=has_bias)


def read_gemma_decoder(config: ConfigReader, attentions: list[GroupedQueries]) -> DecoderSpec:
    """Embeddings grow by the root of their size, and norms are saved as what they differ from one."""
    mlp = DenseMlp(config.integer("intermediate_size"), read_activation(config, "hidden_activation"))
    return replace(
        read_decoder(config, [LayerSpec(attention, mlp) for attention in attentions]),
        embedding_scale=config.integer("hidden_size") ** 0.5,
        norm_offset=1.0,
        has_post_norms=True,
        logit_soft_cap=config.optional_number("final_logit_softcapping"),
    )
