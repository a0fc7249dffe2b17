"""Mixtral (Jiang et al. 2024): Mistral's attention, and in every layer experts whose weights add up to one."""

from __future__ import annotations

from typing import Final

from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import (
    read_activation,
    read_attention,
    read_decoder,
    read_num_experts,
    read_num_layers,
    read_routing,
    with_window,
)
from worker_svc.models.spec import DecoderSpec, ExpertNames, LayerSpec, Mixture

NAMES: Final = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def read_spec(config: ConfigReader) -> DecoderSpec:
    """No window unless there is a `sliding_window`."""
    config = config.with_defaults(rope_theta=1e6, rms_norm_eps=1e-5)
    window = None if config.config.get("sliding_window") is None else config.integer("sliding_window")
    num_experts = read_num_experts(config, "num_local_experts")
    mlp = Mixture(
        num_experts,
        config.integer("intermediate_size"),
        read_activation(config),
        read_routing(config, num_experts, is_normalized=True),
        NAMES,
    )
    layer = LayerSpec(with_window(read_attention(config), window), mlp)
    return read_decoder(config, [layer] * read_num_layers(config))
