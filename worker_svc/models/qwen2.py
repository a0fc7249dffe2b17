"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's shape with biases on q, k and v, and an optional sliding window."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import read_attention, read_decoder, read_mlp, read_qwen_windows, with_window
from worker_svc.models.spec import DecoderSpec, LayerSpec


def read_spec(config: ConfigReader) -> DecoderSpec:
    attention = replace(read_attention(config), qkv_bias=True)
    mlp = read_mlp(config)
    layers = [LayerSpec(with_window(attention, window), mlp) for window in read_qwen_windows(config)]
    return read_decoder(config, layers)
