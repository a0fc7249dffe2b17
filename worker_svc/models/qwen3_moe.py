"""Qwen3 with experts (Yang et al. 2025): the attention of the dense models, and experts in most or all layers."""

from __future__ import annotations

from worker_svc.models.config import ConfigReader
from worker_svc.models.keys import (
    read_activation,
    read_decoder,
    read_mlp,
    read_num_experts,
    read_num_layers,
    read_routing,
    with_window,
)
from worker_svc.models.qwen3 import read_normed_attention
from worker_svc.models.spec import DecoderSpec, LayerSpec, Mixture


def read_spec(config: ConfigReader) -> DecoderSpec:
    """The window, where there is one, is that of all layers."""
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window") else None
    attention = with_window(read_normed_attention(config), window)
    experts, mlp = _read_mixture(config), read_mlp(config)
    layers = [LayerSpec(attention, experts if has_experts else mlp) for has_experts in _read_places(config)]
    return read_decoder(config, layers)


def _read_mixture(config: ConfigReader) -> Mixture:
    # What the hub's folders call `num_experts`, transformers 5 saves by the other name.
    num_experts = read_num_experts(config, "num_experts", "num_local_experts")
    routing = read_routing(config, num_experts, is_normalized=config.flag("norm_topk_prob"))
    return Mixture(num_experts, config.integer("moe_intermediate_size"), read_activation(config), routing)


def _read_places(config: ConfigReader) -> list[bool]:
    """Of each layer, whether it has experts: each `decoder_sparse_step`th, but for `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", 1)
    dense = config.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise config.error("mlp_only_layers is not a list of layers")
    return [(layer + 1) % step == 0 and layer not in dense for layer in range(read_num_layers(config))]
