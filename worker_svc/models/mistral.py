"""Mistral 7B (Jiang et al. 2023): Llama's shape, and before version 0.2 a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from worker_svc.models.config import ConfigReader
from worker_svc.models.spec import DecoderSpec, read_decoder

DEFAULT_WINDOW: Final = 4096


def read_spec(config: ConfigReader) -> DecoderSpec:
    """A `sliding_window` of null is none; without the key it is the 4096 of the first release."""
    spec = read_decoder(config)
    if "sliding_window" in config.config and config.config["sliding_window"] is None:
        return spec
    return replace(spec, windows=(config.integer("sliding_window", DEFAULT_WINDOW),) * spec.num_layers)
