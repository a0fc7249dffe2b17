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
}
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "whole": lambda: [dict(enumerate(LENS))],
    "one_by_one": lambda: one_after_another(LENS, 1),
    "in_odd_chunks": lambda: one_after_another(LENS, 7),
    "mixed": lambda: mixed(LENS),
}


@dataclass(frozen=True, slots=True)
class Judged:
    """A model in both implementations."""

    reference: Any
    runner: Runner

    def expected(self, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return logits


@pytest.fixture(scope="module", params=CASES)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    family, overrides = CASES[request.param]
    folder = save_random_model(tmp_path_factory.mktemp("model"), family, dict(overrides))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imported here, since it takes seconds.
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield Judged(reference, make_runner(folder))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_equal_those_of_transformers(judged: Judged, schedule: str) -> None:
    sequences = random_sequences(LENS)
    logits = Driver(judged.runner, sequences).play(SCHEDULES[schedule]())
    for tokens, computed in zip(sequences, logits, strict=True):
        torch.testing.assert_close(computed, judged.expected(tokens), rtol=0, atol=TOLERANCE)


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
