"""Qwen3, dense (Yang et al. 2025): q and k are normed per head, no biases by default, heads of 128 channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from worker_svc.models.config import ConfigReader
from worker_svc.models.spec import DecoderSpec, read_decoder, read_windows

DEFAULT_HEAD_DIM: Final = 128


def read_spec(config: ConfigReader) -> DecoderSpec:
    attention_bias = config.flag("attention_bias")
    spec = read_decoder(config, default_head_dim=DEFAULT_HEAD_DIM)
    return read_windows(config, replace(spec, qk_norm=True, qkv_bias=attention_bias, output_bias=attention_bias))
