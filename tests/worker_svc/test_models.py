"""Every family against transformers: the same folder, the same tokens, the same logits."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.steps import Driver, Schedule, make_runner, mixed, one_after_another
from worker_svc.runner import Runner

# Logits here are of magnitude 1 to 30; both sides compute in float32, in different orders.
TOLERANCE = 1e-4
VOCAB = 96
# One token, a block and one more or less, and some blocks.
LENS = (1, 15, 16, 17, 33, 50)

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5],
    "long_factor": [1.0, 1.3, 2.0, 4.0, 9.0, 20.0],
    "partial_rotary_factor": 0.75,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_without_gqa": ("llama", {"num_key_value_heads": 4}),
    "llama_with_groups_of_4": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_with_wide_heads": ("llama", {"head_dim": 20}),
    "llama_with_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_of_one_layer_in_float16": ("llama", {"num_hidden_layers": 1, "dtype": "float16"}),
    "llama_with_linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    ),
    "llama_with_llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_with_window_of_7": ("mistral", {"sliding_window": 7}),
    "mistral_with_window_of_16": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied_with_windows_in_the_last_layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_with_biases_and_windows_in_the_first_layer": (
        "qwen3",
        {
            "attention_bias": True,
            "head_dim": 10,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama_sharded": ("llama", {"shards": True}),
    "llama_with_dynamic_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "qwen3_with_yarn": (
        "qwen3",
        {
            "head_dim": 20,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_with_yarn_of_fractions": (
        "llama",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 2.0,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "truncate": False,
                "attention_factor": 1.3,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mixtral": ("mixtral", {}),
    "mixtral_with_one_of_three_experts_and_window": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6, "head_dim": 10},
    ),
    "mixtral_with_all_experts_without_gqa": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 5, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}),
    "qwen3_moe_normalized_with_dense_layers": (
        "qwen3_moe",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 9,
            "norm_topk_prob": True,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "head_dim": 12,
        },
    ),
    "qwen3_moe_with_window_and_biases": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 7,
            "use_sliding_window": True,
            "sliding_window": 8,
            "attention_bias": True,
        },
    ),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 20}),
    "gemma2_with_tight_caps": (
        "gemma2",
        {
            "head_dim": 12,
            "num_key_value_heads": 4,
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 3,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 7, "num_hidden_layers": 7}),
    "gemma3_with_cap_and_linear_rope": (
        "gemma3_text",
        {
            "head_dim": 14,
            "num_key_value_heads": 1,
            "sliding_window": 16,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 2.0,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma3_untied_with_biases": (
        "gemma3_text",
        {"head_dim": 6, "tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "phi3": ("phi3", {}),
    "phi3_with_window_and_partial_rotation": (
        "phi3",
        {
            "sliding_window": 10,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3_beyond_its_original_context": (
        "phi3",
        {
            "hidden_size": 64,
            "rope_parameters": LONGROPE | {"attention_factor": 1.2},
            # Every text is longer, but for one of a single token, which is not rotated.
            "original_max_position_embeddings": 2,
        },
    ),
    "phi3_within_its_original_context": (
        "phi3",
        {"hidden_size": 64, "rope_parameters": LONGROPE, "max_model_len": 64, "original_max_position_embeddings": 64},
    ),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v2_with_query_bottleneck_and_dense_layer": (
        "deepseek_v2",
        DEEPSEEK | {"q_lora_rank": 11, "first_k_dense_replace": 1, "attention_bias": True, "mlp_bias": False},
    ),
    "deepseek_v2_with_groups": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "n_routed_experts": 9,
            "n_group": 3,
            "topk_group": 2,
            "num_experts_per_tok": 4,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    ),
    "deepseek_v2_with_yarn": (
        "deepseek_v2",
        DEEPSEEK
        | {
            "qk_rope_head_dim": 10,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 16.0,
                "beta_fast": 16,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "whole": lambda: [dict(enumerate(LENS))],
    "one_by_one": lambda: one_after_another(LENS, 1),
    "in_odd_chunks": lambda: one_after_another(LENS, 7),
    "mixed": lambda: mixed(LENS),
}
# Of every kind of attention one goes through all schedules; "mixed" has whole prompts, chunks and single tokens.
THOROUGH = {"llama", "llama_with_groups_of_4", "mistral_with_window_of_7", "gemma2", "deepseek_v2"}
PAIRS = [(case, schedule) for case in CASES for schedule in SCHEDULES if case in THOROUGH or schedule == "mixed"]


@dataclass(frozen=True, slots=True)
class Judged:
    """A model in both implementations."""

    reference: Any
    runner: Runner

    def expected(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return logits


@pytest.fixture(scope="module")
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    family, settings = CASES[request.param]
    overrides = dict(settings)
    max_model_len = overrides.pop("max_model_len", 0)
    folder = save_random_model(tmp_path_factory.mktemp("model"), family, overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imported here, since it takes seconds.
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    yield Judged(reference, make_runner(folder, max_model_len=max_model_len))


@pytest.mark.parametrize(("judged", "schedule"), PAIRS, indirect=["judged"])
def test_logits_equal_those_of_transformers(judged: Judged, schedule: str) -> None:
    sequences = random_sequences(LENS)
    logits = Driver(judged.runner, sequences).play(SCHEDULES[schedule]())
    for tokens, computed in zip(sequences, logits, strict=True):
        torch.testing.assert_close(computed, judged.expected(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("judged", CASES, indirect=True)
def test_logits_of_last_rows_alone_equal_those_of_transformers(judged: Judged) -> None:
    sequences = random_sequences(LENS)
    expected = [judged.expected(tokens) for tokens in sequences]
    driver = Driver(judged.runner, sequences)
    for counts in mixed(LENS, seed=1):
        logits = driver.step_to_ends(counts)
        wanted = torch.stack([expected[i][driver.num_computed[i] - 1] for i in counts])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("judged", CASES, indirect=True)
def test_greedy_text_equals_that_of_transformers(judged: Judged) -> None:
    prompts = random_sequences((3, 18))
    wanted = [
        judged.reference.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
        for p in prompts
    ]
    sequences = [[*p, *[0] * 12] for p in prompts]
    driver = Driver(judged.runner, sequences)
    counts = {i: len(p) for i, p in enumerate(prompts)}
    for _ in range(12):
        for i, logits in zip(counts, driver.step(counts), strict=True):
            sequences[i][driver.num_computed[i]] = int(logits[-1].argmax())
        counts = dict.fromkeys(counts, 1)
    assert sequences == wanted


def save_random_model(folder: Path, family: str, overrides: dict[str, Any]) -> Path:
    """What `save_pretrained` writes for a random model, in which no bias is zero and no norm one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM

    shards = overrides.pop("shards", False)
    dtype = getattr(torch, overrides.pop("dtype", "float32"))
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        | overrides,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": "10KB"} if shards else {}))
    assert (folder / "model.safetensors.index.json").exists() == shards
    return folder


def random_sequences(lens: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lens]
