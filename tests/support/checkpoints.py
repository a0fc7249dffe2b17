"""Random tiny checkpoints of every family, as Hugging Face folders, for whoever needs a real model in milliseconds."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.models import FAMILIES
from worker_svc.models.config import ConfigReader
from worker_svc.models.decoder import asked_by

SPECIAL_TOKENS: Final = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

ARCHITECTURES: Final = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# What a family's config says besides, or instead.
_GEMMA: Final = {"query_pre_attn_scalar": 8, "sliding_window": 20, "tie_word_embeddings": True}
_OF_FAMILY: Final[dict[str, dict[str, Any]]] = {
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA
    | {
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CHAT_TEMPLATE: Final = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_TEXT: Final = (
    "Once upon a time there was a fox who lived at the edge of the wood. ",
    "The king had three daughters, and the youngest was the fairest of them all. ",
    "“Who goes there?” asked the old woman; but nobody answered — only the wind did. ",
    "They walked and walked until they came to a little house made of bread. ",
    "Ein Männlein steht im Walde, naïve café, 12 + 34 = 46, и жили они долго. ",
)


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    tokenizer: bool = False,
    seed: int = 0,
    std: float = 0.3,
    **overrides: Any,
) -> Path:
    """Write a model with random weights and return its folder (made if need be).

    About 30,000 parameters: 2 layers, hidden_size 32, 4 heads on 2 KV heads, a vocabulary of 128, 256 positions,
    end-of-sequence token 1. Its greedy text is nonsense, but neither constant nor short of close calls.

    Args:
        family: a key of `ARCHITECTURES`.
        tokenizer: also train a byte-level BPE tokenizer (tokenizer.json, tokenizer_config.json, chat_template.jinja);
            `vocab_size` becomes its size, about 384. Its first ids are `SPECIAL_TOKENS`.
        seed: of the weights: equal arguments give equal files.
        std: of the weights' normal distribution.
        overrides: config.json keys; `dtype="float16"` also sets the type of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": _write_tokenizer(folder) if tokenizer else 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "dtype": "float32",
    }
    config |= _OF_FAMILY.get(family, {}) | overrides
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    save_file(random_weights(config, seed, std), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(config: dict[str, Any], seed: int = 0, std: float = 0.3) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint of this config holds; norms are near one."""
    spec = FAMILIES[config["architectures"][0]](ConfigReader(config, "config"))
    dtype = _DTYPES[config.get("dtype", "float32")]
    backend = TorchBackend(torch.device("cpu"), dtype)
    weights = {}
    for name, shape in asked_by(spec, backend).by_tensor().items():
        # By name, so that a tensor's values do not depend on what else is asked for.
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if "norm" in name else std * noise).to(dtype)
    return weights


def _write_tokenizer(folder: Path) -> int:
    """Returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 2, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, "utf-8")
    named = {
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "pad_token": SPECIAL_TOKENS[PAD_ID],
    }
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _CHAT_TEMPLATE, **named},
    )
    return int(tokenizer.get_vocab_size())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), "utf-8")
