"""The model families that a worker can load: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from worker_svc.models import llama, mistral, qwen2, qwen3
from worker_svc.models.config import ConfigReader
from worker_svc.models.spec import DecoderSpec

# By the name that config.json gives in `architectures`.
FAMILIES: Final[dict[str, Callable[[ConfigReader], DecoderSpec]]] = {
    "LlamaForCausalLM": llama.read_spec,
    "MistralForCausalLM": mistral.read_spec,
    "Qwen2ForCausalLM": qwen2.read_spec,
    "Qwen3ForCausalLM": qwen3.read_spec,
}


def read_spec(folder: ModelFolder) -> DecoderSpec:
    """What the folder's config.json says about the model.

    Raises:
        SettingsError: a family that is not known, or a config that lacks, contradicts or asks for something unknown.
    """
    config = ConfigReader(folder.config, f"{folder.path.name}/config.json")
    names = folder.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise SettingsError(f"{config.source}: architecture {name!r} is not known; known are {known}")
    if folder.config.get("quantization_config"):
        raise SettingsError(f"{config.source}: quantization_config is set, and quantized weights cannot be loaded")
    return FAMILIES[name](config)
