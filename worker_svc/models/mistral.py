"""Mistral 7B (Jiang et al. 2023): Llama's shape, and before version 0.2 a sliding window in every layer."""

from __future__ import annotations

from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import read_attention, read_decoder, read_mlp, read_num_layers, with_window
from worker_svc.models.spec import DecoderSpec, LayerSpec


def read_spec(config: ConfigReader) -> DecoderSpec:
    """A `sliding_window` of null is none; without the key it is the 4096 of the first release."""
    config = config.with_defaults(sliding_window=4096)
    window = None if config.config["sliding_window"] is None else config.integer("sliding_window")
    layer = LayerSpec(with_window(read_attention(config), window), read_mlp(config))
    return read_decoder(config, [layer] * read_num_layers(config))
