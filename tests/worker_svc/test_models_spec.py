"""Reading config.json: both styles of rotary settings, windows, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weft.errors import SettingsError
from weft.messages import SamplingParams
from weft.model_folder import ModelFolder
from worker_svc.models import FAMILIES, read_spec
from worker_svc.models.spec import MAX_LAYERS, DecoderSpec
from worker_svc.rope import Rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def spec(architecture: str = "LlamaForCausalLM", **overrides: Any) -> DecoderSpec:
    config: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    } | overrides
    return read_spec(ModelFolder(Path("some/model"), "model", config, 256, 100, (), SamplingParams()))


def test_old_and_new_style_of_rotary_settings_read_the_same() -> None:
    old = spec(rope_theta=500.0, rope_scaling=LLAMA3)
    new = spec(rope_parameters={"rope_theta": 500.0, **LLAMA3})
    assert old == new
    assert old.rope == Rope(500.0, 8.0, 1.0, 4.0, 64)


def test_oldest_style_names_the_rope_type_just_type() -> None:
    assert spec(rope_scaling={"type": "linear", "factor": 2.0}).rope == Rope(10000.0, factor=2.0)


def test_null_rope_scaling_is_none() -> None:
    assert spec(rope_theta=1e6, rope_scaling=None).rope == Rope(1e6)


def test_head_dim_is_derived_unless_given() -> None:
    assert spec().head_dim == 8
    assert spec(head_dim=None).head_dim == 8
    assert spec(head_dim=20).head_dim == 20
    assert spec("Qwen3ForCausalLM").head_dim == 128


def test_as_many_kv_heads_as_heads_without_the_key() -> None:
    assert spec(num_key_value_heads=None).num_kv_heads == 4


def test_mistral_has_a_window_unless_it_is_null() -> None:
    assert spec("MistralForCausalLM").windows == (4096,) * 3
    assert spec("MistralForCausalLM", sliding_window=None).windows == (None,) * 3
    assert spec("MistralForCausalLM", sliding_window=7).windows == (7,) * 3


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_has_windows_only_where_it_says_so(architecture: str) -> None:
    assert spec(architecture, sliding_window=9).windows == (None,) * 3
    windows = {"use_sliding_window": True, "sliding_window": 9}
    assert spec(architecture, **windows).windows == (None,) * 3
    assert spec(architecture, **windows, max_window_layers=1).windows == (None, 9, 9)
    assert spec(architecture, **windows, max_window_layers=0).windows == (9, 9, 9)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert spec(architecture, **windows, layer_types=kinds).windows == (9, None, None)


def test_biases_of_each_family() -> None:
    biases = {
        (name, asked): (found.qkv_bias, found.output_bias, found.mlp_bias)
        for name in FAMILIES
        for asked in (False, True)
        for found in [spec(name, attention_bias=asked, mlp_bias=asked)]
    }
    assert biases == {
        ("LlamaForCausalLM", False): (False, False, False),
        ("LlamaForCausalLM", True): (True, True, True),
        ("MistralForCausalLM", False): (False, False, False),
        ("MistralForCausalLM", True): (False, False, False),
        ("Qwen2ForCausalLM", False): (True, False, False),
        ("Qwen2ForCausalLM", True): (True, False, False),
        ("Qwen3ForCausalLM", False): (False, False, False),
        ("Qwen3ForCausalLM", True): (True, True, False),
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
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": [1, 2]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads 5"),
        ({"head_dim": 7}, "head_dim 7"),
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
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_config_that_cannot_be_served_is_refused_by_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as refused:
        spec(**overrides)
    assert named in str(refused.value)
    assert "model/config.json" in str(refused.value)


@pytest.mark.parametrize("kinds", [["full_attention"], ["chunked_attention"] * 3, "full_attention", [[], {}, 1]])
def test_bad_layer_types_are_refused(kinds: Any) -> None:
    with pytest.raises(SettingsError, match="layer_types"):
        spec("Qwen2ForCausalLM", use_sliding_window=True, layer_types=kinds)
