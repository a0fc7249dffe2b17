"""Rotary settings of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""

from __future__ import annotations

import math
from typing import Final

from worker_svc.models.config import ConfigReader
from worker_svc.rope import Linear, Llama3, LongRope, Rope, Scaling, Yarn

KNOWN_TYPES: Final = "default, linear, dynamic, llama3, yarn, longrope"


def read_rope(config: ConfigReader, rotary_dim: int) -> Rope:
    """Frequencies of a model whose layers all have the same.

    Raises:
        SettingsError: a type that is not known, a key that is missing or wrong, or more tokens than the type allows.
    """
    section = rope_section(config)
    return make_rope(config, section, section.number("rope_theta", config.number("rope_theta", 10000.0)), rotary_dim)


def rope_section(config: ConfigReader) -> ConfigReader:
    return config.section("rope_parameters" if config.config.get("rope_parameters") else "rope_scaling")


def read_rotary_dim(config: ConfigReader, head_dim: int) -> int:
    """Channels of each head that are rotated: `partial_rotary_factor` of them."""
    section = rope_section(config)
    share = config.number("partial_rotary_factor", section.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * share)
    if share > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise section.error(f"partial_rotary_factor {share:g} of head_dim {head_dim} is no even number of channels")
    return rotary_dim


def make_rope(config: ConfigReader, section: ConfigReader, theta: float, rotary_dim: int) -> Rope:
    """`section`: where the type and its keys are; `config`: the whole."""
    if theta <= 1:
        raise section.error(f"rope_theta is {theta:g}, not more than 1")
    return Rope(theta, _read_scaling(config, section, rotary_dim))


def _read_scaling(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> Scaling | None:
    rope_type = section.config.get("rope_type", section.config.get("type", "default"))
    match rope_type:
        case "default":
            return None
        case "dynamic":
            # Scales beyond `max_position_embeddings` only, which no sequence here gets.
            return None
        case "linear":
            return Linear(section.number("factor"))
        case "llama3":
            return _read_llama3(config, section)
        case "yarn" if "long_factor" not in section.config:
            return _read_yarn(config, section)
        case "longrope" | "su" | "yarn":  # the first Phi-3 called it by the other names
            return _read_longrope(config, section, rotary_dim)
        case _:
            raise section.error(f"rope_type {rope_type!r} is not known; known are {KNOWN_TYPES}")


def _read_llama3(config: ConfigReader, section: ConfigReader) -> Llama3:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.error(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return Llama3(section.number("factor"), low, high, _original_context(config, section))


def _read_yarn(config: ConfigReader, section: ConfigReader) -> Yarn:
    context = _original_context(config, section)
    factor = section.number("factor", config.integer("max_position_embeddings") / context)
    if config.max_model_len is not None and config.max_model_len > factor * context:
        raise section.error(
            f"max_model_len {config.max_model_len} is more than the {int(factor * context)} tokens that "
            f"original_max_position_embeddings {context} times factor {factor:g} allow"
        )
    fast, slow = section.number("beta_fast", 32.0), section.number("beta_slow", 1.0)
    if fast < slow:
        raise section.error(f"beta_fast {fast:g} is below beta_slow {slow:g}")
    return Yarn(
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        original_context=context,
        attention_factor=section.number("attention_factor", _yarn_attention_factor(section, factor)),
        is_truncated=section.flag("truncate", True),
    )


def yarn_magnitude(factor: float, weight: float) -> float:
    """By how much scores are to grow with the context (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_factor(section: ConfigReader, factor: float) -> float:
    over, under = section.optional_number("mscale"), section.optional_number("mscale_all_dim")
    if over is None or under is None:
        return yarn_magnitude(factor, 1.0)
    return yarn_magnitude(factor, over) / yarn_magnitude(factor, under)


def _read_longrope(config: ConfigReader, section: ConfigReader, rotary_dim: int) -> LongRope:
    """One list of factors for all that is served.

    `transformers` takes the long list for a text as soon as it is longer than the original context, and then computes
    all of it anew: each key in the cache is turned by one list or the other. A cache that sequences share cannot hold
    both. So what may come decides: the long list if sequences beyond the original context are served. With
    `max_model_len` up to there, short texts are as `transformers` has them.
    """
    context = _original_context(config, section)
    served = config.max_model_len or config.integer("max_position_embeddings")
    factor = section.number("factor", config.integer("max_position_embeddings") / context)
    if context == 1:
        raise section.error("original_max_position_embeddings is 1")
    grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    lists = {key: section.numbers(key, rotary_dim // 2) for key in ("short_factor", "long_factor")}
    is_long = served > context
    return LongRope(
        factors=lists["long_factor" if is_long else "short_factor"],
        is_long=is_long,
        attention_factor=section.number("attention_factor", grown),
    )


def _original_context(config: ConfigReader, section: ConfigReader) -> int:
    """Tokens the model was first trained with; Phi-3 has them beside the section."""
    key = "original_max_position_embeddings"
    return config.integer(key, section.integer(key, config.integer("max_position_embeddings")))
