"""Reading config.json: both styles of rotary settings, windows, and every refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.errors import SettingsError
from weft.messages import SamplingParams
from weft.model_folder import ModelFolder
from worker_svc.models import FAMILIES, read_spec
from worker_svc.models.keys import MAX_LAYERS
from worker_svc.models.spec import DecoderSpec, DenseMlp, GroupedQueries, Latent, Mixture
from worker_svc.rope import Linear, Llama3, LongRope, Rope, Yarn

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
# Keys that a family's folders have, and the tests' other families do not know.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "MixtralForCausalLM": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}


def spec(architecture: str = "LlamaForCausalLM", *, max_model_len: int = 256, **overrides: Any) -> DecoderSpec:
    config: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config |= (OF_FAMILY.get(architecture, {}) if isinstance(architecture, str) else {}) | overrides
    return read_spec(ModelFolder(Path("some/model"), "model", config, max_model_len, 100, (), SamplingParams()))


def attention(architecture: str = "LlamaForCausalLM", **overrides: Any) -> GroupedQueries:
    """Of the first layer."""
    found = spec(architecture, **overrides).layers[0].attention
    assert isinstance(found, GroupedQueries)
    return found


def windows(architecture: str, **overrides: Any) -> tuple[int | None, ...]:
    return tuple(kind.window for kind in spec(architecture, **overrides).attention_kinds)


def test_old_and_new_style_of_rotary_settings_read_the_same() -> None:
    old = spec(rope_theta=500.0, rope_scaling=LLAMA3)
    new = spec(rope_parameters={"rope_theta": 500.0, **LLAMA3})
    assert old == new
    assert old.layers[0].attention.rope == Rope(500.0, Llama3(8.0, 1.0, 4.0, 64))


def test_oldest_style_names_the_rope_type_just_type() -> None:
    assert attention(rope_scaling={"type": "linear", "factor": 2.0}).rope == Rope(10000.0, Linear(2.0))


def test_null_rope_scaling_is_none() -> None:
    assert attention(rope_theta=1e6, rope_scaling=None).rope == Rope(1e6)


def test_dynamic_rope_is_plain_within_the_positions_a_model_was_made_for() -> None:
    assert attention(rope_scaling={"type": "dynamic", "factor": 4.0}).rope == Rope(10000.0)


def test_yarn_has_the_papers_defaults() -> None:
    found = attention(rope_scaling=YARN).rope
    assert found.scaling == Yarn(4.0, 32.0, 1.0, 64, pytest.approx(1.1386294))
    assert found.attention_factor == pytest.approx(1.1386294)


def test_yarn_without_factor_reaches_the_positions_of_the_config() -> None:
    found = attention(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 32}).rope
    assert isinstance(found.scaling, Yarn)
    assert found.scaling.factor == 8.0


@pytest.mark.parametrize(("served", "is_long"), [(64, False), (65, True), (256, True)])
def test_longrope_takes_the_list_for_the_longest_text_served(served: int, is_long: bool) -> None:
    found = spec("Phi3ForCausalLM", rope_scaling=LONGROPE, original_max_position_embeddings=64, max_model_len=served)
    scaling = found.layers[0].attention.rope.scaling
    assert isinstance(scaling, LongRope)
    assert scaling.factors == tuple(LONGROPE["long_factor" if is_long else "short_factor"])
    assert ("long factors" if is_long else "short factors") in found.cache.content


def test_gemma_3_has_positions_of_its_own_in_layers_with_a_window() -> None:
    old = spec(
        "Gemma3ForCausalLM",
        rope_local_base_freq=100.0,
        rope_theta=900.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    )
    new = spec(
        "Gemma3ForCausalLM",
        rope_parameters={
            "sliding_attention": {"rope_theta": 100.0},
            "full_attention": {"rope_theta": 900.0, "rope_type": "linear", "factor": 8.0},
        },
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    assert old == new
    ropes = [layer.attention.rope for layer in old.layers]
    assert ropes == [Rope(100.0), Rope(100.0), Rope(900.0, Linear(8.0))]


def test_head_dim_is_derived_unless_given() -> None:
    assert attention().heads.head_dim == 8
    assert attention(head_dim=None).heads.head_dim == 8
    assert attention(head_dim=20).heads.head_dim == 20
    assert attention("Qwen3ForCausalLM").heads.head_dim == 128
    assert attention("Gemma3ForCausalLM").heads.head_dim == 256


def test_as_many_kv_heads_as_heads_without_the_key() -> None:
    assert attention(num_key_value_heads=None).heads.num_kv_heads == 4


def test_only_a_part_of_each_head_is_rotated_where_the_family_says_so() -> None:
    heads = attention("Phi3ForCausalLM", partial_rotary_factor=0.75).heads
    assert (heads.head_dim, heads.rotary_dim) == (8, 6)


def test_mistral_has_a_window_unless_it_is_null() -> None:
    assert windows("MistralForCausalLM") == (4096,) * 3
    assert windows("MistralForCausalLM", sliding_window=None) == (None,) * 3
    assert windows("MistralForCausalLM", sliding_window=7) == (7,) * 3


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Phi3ForCausalLM"])
def test_some_have_a_window_only_if_there_is_the_key(architecture: str) -> None:
    assert windows(architecture) == (None,) * 3
    assert windows(architecture, sliding_window=7) == (7,) * 3


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_has_windows_only_where_it_says_so(architecture: str) -> None:
    assert windows(architecture, sliding_window=9) == (None,) * 3
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 9}
    assert windows(architecture, **sliding) == (None,) * 3
    assert windows(architecture, **sliding, max_window_layers=1) == (None, 9, 9)
    assert windows(architecture, **sliding, max_window_layers=0) == (9, 9, 9)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(architecture, **sliding, layer_types=kinds) == (9, None, None)


def test_gemma_has_windows_in_most_layers_without_being_told() -> None:
    assert windows("Gemma2ForCausalLM") == (4096, None, 4096)
    assert windows("Gemma3ForCausalLM", num_hidden_layers=7, sliding_window=5) == (5, 5, 5, 5, 5, None, 5)


def test_experts_are_where_the_config_puts_them() -> None:
    def places(architecture: str, **overrides: Any) -> list[bool]:
        layers = spec(architecture, num_hidden_layers=4, **overrides).layers
        return [isinstance(layer.mlp, Mixture) for layer in layers]

    assert places("MixtralForCausalLM") == [True] * 4
    assert places("Qwen3MoeForCausalLM", decoder_sparse_step=2, mlp_only_layers=[3]) == [False, True, False, False]
    assert places("DeepseekV2ForCausalLM", first_k_dense_replace=2) == [False, False, True, True]


def test_number_of_experts_is_read_under_both_names() -> None:
    old, new = (spec("Qwen3MoeForCausalLM", num_experts=n, num_local_experts=m) for n, m in ((6, None), (None, 6)))
    assert old == new


def test_latent_attention_caches_one_head_of_latent_and_shared_key() -> None:
    found = spec("DeepseekV2ForCausalLM")
    assert (found.cache.num_heads, found.cache.width) == (1, 20)
    assert isinstance(found.layers[0].attention, Latent)


def test_grouped_queries_cache_keys_and_values_of_every_kv_head() -> None:
    assert (spec().cache.num_heads, spec().cache.width) == (4, 8)


@pytest.mark.parametrize("asked", [False, True])
def test_biases_of_each_family(asked: bool) -> None:
    of_qkv_output_and_mlp = {}
    for name in FAMILIES.keys() - {"DeepseekV2ForCausalLM"}:
        layer = spec(name, attention_bias=asked, mlp_bias=asked).layers[0]
        assert isinstance(layer.attention, GroupedQueries)
        has_mlp_bias = isinstance(layer.mlp, DenseMlp) and layer.mlp.has_bias
        of_qkv_output_and_mlp[name] = (layer.attention.qkv_bias, layer.attention.output_bias, has_mlp_bias)
    assert of_qkv_output_and_mlp == {
        "Gemma2ForCausalLM": (asked, asked, False),
        "Gemma3ForCausalLM": (asked, asked, False),
        "LlamaForCausalLM": (asked, asked, asked),
        "MistralForCausalLM": (False, False, False),
        "MixtralForCausalLM": (False, False, False),
        "Phi3ForCausalLM": (False, False, False),
        "Qwen2ForCausalLM": (True, False, False),
        "Qwen3ForCausalLM": (asked, asked, False),
        "Qwen3MoeForCausalLM": (asked, asked, False),
    }


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaModel", 7])
def test_unknown_architecture_is_refused_with_the_known_ones(architecture: Any) -> None:
    with pytest.raises(SettingsError) as refused:
        spec(architecture)
    assert repr(architecture) in str(refused.value)
    assert all(name in str(refused.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope'"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is 1"),
        ({"rope_scaling": YARN | {"factor": 2.0}}, "max_model_len 256 is more than the 128 tokens"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast 0.5 is below beta_slow 1"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0] * 5}}, "long_factor is not a list of 4 positive numbers"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}}, "short_factor"),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, "original_max_position_embeddings is 1"),
        ({"rope_scaling": [1, 2]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads 5"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"head_dim": 2**20}, "head_dim is 1048576"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as refused:
        spec(**overrides)
    assert named in str(refused.value)
    assert "model/config.json" in str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "overrides", "named"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("MixtralForCausalLM", {"num_local_experts": None}, "num_local_experts is None"),
        ("Qwen3MoeForCausalLM", {"num_experts": None}, "num_experts is None"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ("DeepseekV2ForCausalLM", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ("DeepseekV2ForCausalLM", {"kv_lora_rank": None}, "kv_lora_rank is None"),
        ("DeepseekV2ForCausalLM", {"kv_lora_rank": 15}, "kv_lora_rank 15 is odd"),
        ("DeepseekV2ForCausalLM", {"qk_rope_head_dim": 3}, "qk_rope_head_dim 3 is odd"),
        ("DeepseekV2ForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("DeepseekV2ForCausalLM", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepseekV2ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("DeepseekV2ForCausalLM", GROUPS | {"n_group": 3}, "n_routed_experts 8 is no multiple of n_group 3"),
        ("DeepseekV2ForCausalLM", GROUPS | {"topk_group": 5}, "topk_group is 5"),
        ("DeepseekV2ForCausalLM", GROUPS | {"num_experts_per_tok": 3}, "more than topk_group 1 groups hold"),
    ],
)
def test_config_of_a_family_that_cannot_be_served_is_refused_by_name(
    architecture: str, overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        spec(architecture, **overrides)
    assert named in str(refused.value)
    assert "model/config.json" in str(refused.value)


@pytest.mark.parametrize("kinds", [["full_attention"], ["chunked_attention"] * 3, "full_attention", [[], {}, 1]])
def test_bad_layer_types_are_refused(kinds: Any) -> None:
    with pytest.raises(SettingsError, match="layer_types"):
        spec("Qwen2ForCausalLM", use_sliding_window=True, layer_types=kinds)


KEYS = re.findall(
    r"\w+",
    """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta
    rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings max_position_embeddings
    sliding_window use_sliding_window max_window_layers layer_types sliding_window_pattern hidden_act
    hidden_activation query_pre_attn_scalar kv_lora_rank q_lora_rank qk_rope_head_dim n_routed_experts
    num_experts_per_tok topk_method n_group topk_group scoring_func num_local_experts mlp_only_layers""",
)
LEAVES = st.sampled_from(
    [None, 0, 1, 2, 3, 7, -1, 2**70, True, 0.5, -0.5, 5e-324, 1e308, float("nan"), float("inf"), "", "yarn", "longrope"]
)
SECTIONS = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "beta_fast", "mscale", "rope_theta", "full_attention"]), LEAVES
)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(KEYS), LEAVES | SECTIONS | st.lists(LEAVES | SECTIONS, max_size=4), max_size=3),
    st.sampled_from([1, 256, 10**6]),
)
@example("LlamaForCausalLM", {"partial_rotary_factor": 1e308}, 256)
@example("LlamaForCausalLM", {"hidden_act": [[]]}, 256)
@settings(max_examples=300, deadline=None)
def test_any_config_is_read_or_refused_in_one_line(architecture: str, config: dict[str, Any], served: int) -> None:
    try:
        spec(architecture, max_model_len=served, **config)
    except SettingsError as refused:
        assert "\n" not in str(refused)
