"""Where a model folder's weights come from: its files, or nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from worker_svc.backends.backend import Backend
from worker_svc.dummy import DummyWeights
from worker_svc.formats import read_format
from worker_svc.formats.format import FLOATS
from worker_svc.weights import Checkpoint

INT8: Final = "int8"


def resolve_quantize(dtype: str, quantize: str) -> tuple[str, str]:
    """The settings of those names, where the type int8 means floats with linears of int8.

    Raises:
        SettingsError: they contradict each other.
    """
    if dtype != INT8:
        return dtype, quantize
    if quantize not in ("none", INT8):
        raise SettingsError(f"dtype: int8 means --quantize int8, and quantize is {quantize}")
    return "auto", INT8


def open_source(
    folder: ModelFolder, backend: Backend, quantize: str, on_progress: Callable[[float], None]
) -> Checkpoint | DummyWeights:
    """Open a folder's weights.

    Args:
        quantize: what the loader will do with float weights of linears.
        on_progress: called with the share that is read so far.

    Raises:
        SettingsError: files are missing or broken, the format is not known, or the weights are quantized already.
    """
    format = read_format(folder)
    if quantize != "none" and format is not FLOATS:
        method = folder.config["quantization_config"]["quant_method"]
        raise SettingsError(f"quantize: {folder.path.name} is quantized already, by {method}, and loads without")
    if folder.is_dummy:
        return DummyWeights(format, backend.device, backend.dtype, quantize)
    return Checkpoint(folder.path, format, backend.device, on_progress)
