"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's shape with biases on q, k and v, and an optional sliding window."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.config import ConfigReader
from worker_svc.models.spec import DecoderSpec, read_decoder, read_windows


def read_spec(config: ConfigReader) -> DecoderSpec:
    return read_windows(config, replace(read_decoder(config), qkv_bias=True))
