"""The formats of quantized checkpoints that a worker can load: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from worker_svc.formats import awq, compressed_tensors, fp8, gptq
from worker_svc.formats.format import FLOATS, Format
from worker_svc.models.config import ConfigReader

# By `quant_method` in config.json's `quantization_config`; each reads the latter, with the folder's name for errors.
FORMATS: Final[dict[str, Callable[[ConfigReader, str], Format]]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
}


def read_format(folder: ModelFolder) -> Format:
    """How the folder's checkpoint holds its weights.

    Raises:
        SettingsError: a format that is not known, or that says what is not known.
    """
    config = ConfigReader(folder.config, f"{folder.path.name}/config.json")
    section = config.section("quantization_config")
    if not section.config:
        return FLOATS
    method = section.config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        known = ", ".join(FORMATS)
        raise SettingsError(f"{section.source}: quant_method {method!r} is not known; known are {known}")
    return FORMATS[method](section, folder.path.name)
