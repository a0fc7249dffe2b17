"""The model families that a worker can load: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from worker_svc.models import (
    deepseek_v2,
    gemma2,
    gemma3,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from worker_svc.models.config import ConfigReader
from worker_svc.models.spec import DecoderSpec

# By the name that config.json gives in `architectures`.
FAMILIES: Final[dict[str, Callable[[ConfigReader], DecoderSpec]]] = {
    "DeepseekV2ForCausalLM": deepseek_v2.read_spec,
    "Gemma2ForCausalLM": gemma2.read_spec,
    "Gemma3ForCausalLM": gemma3.read_spec,
    "LlamaForCausalLM": llama.read_spec,
    "MistralForCausalLM": mistral.read_spec,
    "MixtralForCausalLM": mixtral.read_spec,
    "Phi3ForCausalLM": phi3.read_spec,
    "Qwen2ForCausalLM": qwen2.read_spec,
    "Qwen3ForCausalLM": qwen3.read_spec,
    "Qwen3MoeForCausalLM": qwen3_moe.read_spec,
}


def read_spec(folder: ModelFolder) -> DecoderSpec:
    """What the folder's config.json says about the model.

    Raises:
        SettingsError: a family that is not known, or a config that lacks, contradicts or asks for something unknown.
    """
    config = ConfigReader(folder.config, f"{folder.path.name}/config.json", folder.max_model_len)
    names = folder.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SettingsError(f"{config.source}: architecture {name!r} is not known; known are {known}")
    return FAMILIES[name](config)
