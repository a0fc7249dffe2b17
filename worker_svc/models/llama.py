"""Llama 1-3 (Touvron et al. 2023; Grattafiori et al. 2024) and the many that share its shape."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.config import ConfigReader
from worker_svc.models.spec import DecoderSpec, read_decoder


def read_spec(config: ConfigReader) -> DecoderSpec:
    """Biases are an option, absent in Meta's own models."""
    attention_bias = config.flag("attention_bias")
    return replace(
        read_decoder(config),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias"),
    )
