"""Gemma 3, text (Gemma Team 2025): Gemma 2 with norms of q and k; layers with a window have positions of their own.

As in `transformers`, scores have no soft cap even if the config names one, which no published Gemma 3 does.
"""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.config import ConfigReader
from worker_svc.models.gemma2 import read_gemma_attention, read_gemma_decoder, with_gemma_defaults
from worker_svc.models.keys import read_heads, read_num_layers, read_sliding_layers, with_window
from worker_svc.models.positions import make_rope
from worker_svc.models.spec import DecoderSpec
from worker_svc.rope import Rope


def read_spec(config: ConfigReader) -> DecoderSpec:
    """Without `layer_types`, each `sliding_window_pattern`th layer sees everything."""
    config = with_gemma_defaults(config)
    local_rope, far_rope = _read_ropes(config)
    full = replace(read_gemma_attention(config, far_rope), qk_norm=True)
    sliding = replace(with_window(full, config.integer("sliding_window")), rope=local_rope)
    pattern = config.integer("sliding_window_pattern", 6)
    types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(read_num_layers(config))]
    return read_gemma_decoder(
        config, [sliding if is_sliding else full for is_sliding in read_sliding_layers(config, types)]
    )


def _read_ropes(config: ConfigReader) -> tuple[Rope, Rope]:
    """Of layers with a window and of those without.

    transformers 5 has a section for each; before, `rope_scaling` was of the layers without a window.
    """
    by_type, rotary_dim = config.section("rope_parameters"), read_heads(config).rotary_dim
    local, far = by_type.section("sliding_attention"), by_type.section("full_attention")
    far = far if far.config else config.section("rope_scaling")
    local_theta = local.number("rope_theta", config.number("rope_local_base_freq", 1e4))
    far_theta = far.number("rope_theta", config.number("rope_theta", 1e6))
    return make_rope(config, local, local_theta, rotary_dim), make_rope(config, far, far_theta, rotary_dim)
