"""Llama 1-3 (Touvron et al. 2023; Grattafiori et al. 2024) and the many that share its shape."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import read_attention, read_decoder, read_mlp, read_num_layers
from worker_svc.models.spec import DecoderSpec, LayerSpec


def read_spec(config: ConfigReader) -> DecoderSpec:
    """Biases are an option, absent in Meta's own models."""
    has_bias = config.flag("attention_bias")
    attention = replace(read_attention(config), qkv_bias=has_bias, output_bias=has_bias)
    mlp = replace(read_mlp(config), has_bias=config.flag("mlp_bias"))
    return read_decoder(config, [LayerSpec(attention, mlp)] * read_num_layers(config))
