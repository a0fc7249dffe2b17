"""A model's weights on a device: what engines read and never write, so that they and whole processes may share it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from weft.errors import SettingsError
from weft.model_folder import ModelFolder
from worker_svc.backends.backend import Backend
from worker_svc.backends.numba_backend import NumbaBackend
from worker_svc.backends.torch_backend import TorchBackend
from worker_svc.cpu_kernels.launch import IS_AVAILABLE
from worker_svc.model_options import ModelOptions
from worker_svc.models import read_spec
from worker_svc.models.decoder import Decoder, asked_by
from worker_svc.models.loader import Loader
from worker_svc.models.spec import CacheShape, DecoderSpec
from worker_svc.parallel.group import ALONE, Group
from worker_svc.parallel.share import share_of
from worker_svc.source import open_source, resolve_quantize
from worker_svc.threads import resolve_threads

# What torch would use by itself: the cores that this process may use. Read before anyone changes it.
DEFAULT_THREADS: Final = torch.get_num_threads()
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """One model, or a rank's share of it."""

    folder: ModelFolder
    device: torch.device
    dtype: torch.dtype  # of weights and KV
    quantize: str  # what float weights of linears became, or "none"
    backend: Backend
    decoder: Decoder
    spec: DecoderSpec  # of the whole model
    cache: CacheShape  # of this rank's layers
    num_weights: int  # of this rank's linears
    group: Group


def load_model(
    folder: ModelFolder,
    options: ModelOptions,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
    group: Group = ALONE,
) -> LoadedModel:
    """Read the weights and pack them for the device.

    Args:
        on_progress: called with the share of the weights loaded so far.
        group: whose rank this is; it has a share of the model.

    Raises:
        SettingsError: names what in the folder or the options does not work.
    """
    torch.set_num_threads(count_threads(options.threads, group))
    where = resolve_device(options.device, group.rank if group.size > 1 else None)
    dtype, quantize = resolve_quantize(options.dtype, options.quantize)
    kind = resolve_dtype(dtype, folder, where)
    spec = read_spec(folder)
    backend = make_backend(options.kernels, where, kind)
    with torch.inference_mode(), open_source(folder, backend, quantize, on_progress) as source:
        asked = asked_by(spec, backend)
        source.check(asked)
        mine = share_of(spec, group.size)
        decoder = Decoder(mine, Loader(source, backend, quantize, group), backend)
    num_weights = sum(rows * columns for rows, columns in asked.linears.values()) // group.size
    return LoadedModel(folder, where, kind, quantize, backend, decoder, spec, mine.cache, num_weights, group)


def count_threads(threads: int, group: Group) -> int:
    """What the setting means for one rank: threads that load, and compute a large step."""
    return max(1, resolve_threads(threads, DEFAULT_THREADS) // group.size)


def make_backend(kernels: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that `kernels` names. Raises SettingsError if the device cannot run it."""
    if device.type == "cpu" and kernels == "auto":
        kernels = "numba" if dtype == torch.float32 and IS_AVAILABLE else "torch"
    if kernels == "numba":
        return _numba_backend(device, dtype)
    if kernels == "torch":
        return TorchBackend(device, dtype)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SettingsError("kernels: triton needs a GPU (or TRITON_INTERPRET=1, to try kernels on a CPU)")
    # Triton is there only where it is used.
    from worker_svc.backends.triton_backend import TritonBackend

    return TritonBackend(device, dtype)


def _numba_backend(device: torch.device, dtype: torch.dtype) -> NumbaBackend:
    if device.type != "cpu" or dtype != torch.float32:
        raise SettingsError("kernels: numba computes in float32 on a CPU")
    if not IS_AVAILABLE:
        raise SettingsError("kernels: numba needs a torch that computes with OpenMP")
    return NumbaBackend(device, dtype)


def resolve_device(device: str, rank: int | None = None) -> torch.device:
    """`rank`: which of several GPUs; None for the one there is. Raises SettingsError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device: cuda is not available on this machine")
    if device == "cuda" and rank is not None:
        torch.cuda.set_device(rank)
        return torch.device(device, rank)
    return torch.device(device)


def resolve_dtype(dtype: str, folder: ModelFolder, device: torch.device) -> torch.dtype:
    """`auto` is float32 on the CPU, where half types are slower than half the bytes make up for; else the config's."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    named = folder.config.get("dtype") or folder.config.get("torch_dtype")
    return DTYPES.get(str(named), torch.bfloat16)
