"""Qwen3, dense (Yang et al. 2025): q and k are normed per head, no biases by default, heads of 128 channels."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import read_attention, read_decoder, read_mlp, read_qwen_windows, with_window
from worker_svc.models.spec import DecoderSpec, GroupedQueries, LayerSpec


def read_spec(config: ConfigReader) -> DecoderSpec:
    config = config.with_defaults(head_dim=128)
    attention, mlp = read_normed_attention(config), read_mlp(config)
    layers = [LayerSpec(with_window(attention, window), mlp) for window in read_qwen_windows(config)]
    return read_decoder(config, layers)


def read_normed_attention(config: ConfigReader) -> GroupedQueries:
    has_bias = config.flag("attention_bias")
    return replace(read_attention(config), qk_norm=True, qkv_bias=has_bias, output_bias=has_bias)
