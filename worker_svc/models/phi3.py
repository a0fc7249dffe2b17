"""Phi-3, 3.5 and 4 (Abdin et al. 2024): fused tensors, LongRoPE, and in Phi-4-mini heads that are rotated in part."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.backends.backend import AttentionKind
from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import read_decoder, read_heads, read_mlp, read_num_layers
from worker_svc.models.positions import read_rope
from worker_svc.models.spec import DecoderSpec, GroupedQueries, LayerSpec


def read_spec(config: ConfigReader) -> DecoderSpec:
    config = config.with_defaults(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    heads = read_heads(config)
    window = None if config.config.get("sliding_window") is None else config.integer("sliding_window")
    kind = AttentionKind(heads.head_dim**-0.5, window)
    attention = GroupedQueries(heads, kind, read_rope(config, heads.rotary_dim), is_fused=True)
    mlp = replace(read_mlp(config), is_fused=True)
    return read_decoder(config, [LayerSpec(attention, mlp)] * read_num_layers(config))
