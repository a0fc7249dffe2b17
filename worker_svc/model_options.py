"""How a worker's models are loaded and run: what every rank of it, and a model that drafts, are told alike."""

from __future__ import annotations

from dataclasses import dataclass

from weft.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Those settings of a worker that are about its model."""

    device: str = "auto"  # or "cpu", "cuda"
    # Of weights and KV; "auto" is float32 on a CPU, else what the config says; "int8" is "auto" with linears of int8.
    dtype: str = "auto"
    kernels: str = "auto"  # or "torch", "triton", "numba"; "auto" is Triton on a GPU, numba on a CPU in float32
    quantize: str = "none"  # or "int8", "int4", "fp8", which float weights of linears become
    threads: int = 0  # of the CPU, to load and for a large step; 0 leaves the mesh its share
    kv_memory: int | float = 0  # as `memory.kv_bytes` wants it

    @classmethod
    def of(cls, settings: WorkerSettings) -> ModelOptions:
        """What the settings say."""
        return cls(
            device=settings.device,
            dtype=settings.dtype,
            kernels=settings.kernels,
            quantize=settings.quantize,
            threads=settings.threads,
            kv_memory=settings.kv_memory,
        )
