"""Tunings and timings of `lab.gpu.matmul`.

A timed call goes through as many weights as are four times an H200's L2 cache, so that each is read from memory as in
a model, where the other layers come in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

import torch
import torch.nn.functional as F

from lab.gpu.case import Timing, Tuning
from worker_svc.kernels import matmul_fp8, matmul_skinny, matmul_weight_only
from worker_svc.kernels.matmul_fp8 import PreparedFp8, prepare_fp8, quantize_fp8
from worker_svc.kernels.matmul_tile import FEW_TOKENS, block_tokens, make_counters
from worker_svc.kernels.packed_weight import PackedWeight, pack_weight
from worker_svc.kernels.tuning import Config
from worker_svc.quantization import FP8, FP8_MAX, Fp8Weight, Int4Weight, Int8Weight

MULTIPROCESSORS: Final = 132  # of an H200
CACHE_BYTES: Final = 4 * 60 * 2**20
# out, in
SHAPES: Final = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
LAYER: Final = ("qkv", "o", "gate_up", "down")
# Of a weight; int4 has 4 bytes for each group of 128.
BYTES: Final = {"bf16": 2.0, "bf16 skinny": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128, "fp8": 1.0, "torch fp8": 1.0}


def tunings(device: torch.device) -> list[Tuning]:
    """Decode steps of few, 16 and 64 tokens, and a prefill."""
    return [
        *_tunings(device, "bf16 skinny", (*LAYER, "head"), (1, 16, 64)),
        *_tunings(device, "int4", LAYER, (1, 64, 4096)),
        *_tunings(device, "int8", LAYER, (1, 64, 4096)),
        *_tunings(device, "fp8", LAYER, (1, 64, 4096)),
    ]


def _tunings(
    device: torch.device, kind: str, names: tuple[str, ...], numbers_of_tokens: tuple[int, ...]
) -> list[Tuning]:
    kernel = {"bf16 skinny": "matmul_skinny", "fp8": "matmul_fp8"}.get(kind, "matmul_weight_only")
    return [
        Tuning(
            kernel,
            _tuning_key(kind, name, num_tokens),
            _candidates(kind, num_tokens),
            partial(_bind, kind, device, (name,), num_tokens),
        )
        for name in names
        for num_tokens in numbers_of_tokens
    ]


def _tuning_key(kind: str, name: str, num_tokens: int) -> str:
    device = torch.device("meta")
    if kind == "bf16 skinny":
        return matmul_skinny.tuning_key(num_tokens, torch.empty(SHAPES[name], dtype=torch.bfloat16, device=device))
    nothing = torch.empty(SHAPES[name], device=device)
    if kind == "fp8":
        return matmul_fp8.tuning_key(num_tokens, PreparedFp8(nothing, nothing, nothing))
    bits, group_size = (4, 128) if kind == "int4" else (8, SHAPES[name][1])
    weight = PackedWeight(bits, *SHAPES[name], group_size, nothing, nothing, nothing)
    return matmul_weight_only.tuning_key(num_tokens, weight, torch.bfloat16)


def _candidates(kind: str, num_tokens: int) -> list[Config]:
    """BLOCK_N, BLOCK_K, stages and splits; for many tokens BLOCK_N, BLOCK_T, warps and stages."""
    if num_tokens > FEW_TOKENS:
        block_k = 128 if kind == "fp8" else 64
        return [
            Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps, stages)
            for block_n, block_t, num_warps, stages in (
                (128, 256, 8, 4),
                (128, 256, 8, 3),
                (256, 128, 8, 4),
                (128, 128, 8, 4),
                (128, 128, 4, 3),
            )
            if kind == "fp8" or stages < 4 or block_t < 256 or kind == "int4"
        ]
    wide = [(64, 128, stages, splits) for stages in (3, 4) for splits in (1, 2, 4, 8)]
    if kind == "bf16 skinny":
        narrow = [(16, 256, 4, 1), (16, 128, 6, 1), (32, 128, 5, 1), (32, 128, 5, 2)] if num_tokens <= 16 else []
        few = [*narrow, *wide[:4], (64, 64, 6, 2), (64, 64, 6, 4)]
    else:
        few = [*wide, *((128, 128, 4, splits) for splits in (1, 2, 4, 8, 16) if num_tokens <= 16)]
    block_t = block_tokens(num_tokens, FEW_TOKENS)
    return [
        Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLITS": splits}, 4, stages)
        for block_n, block_k, stages, splits in few
    ]


def timings(device: torch.device) -> list[Timing]:
    """A layer's four weights and the head, beside the library's 16-bit product."""
    decode = [
        _timing(device, kind, names, num_tokens, bar=0.85 if kind == "bf16 skinny" and num_tokens == 1 else None)
        for num_tokens in (1, 16, 64)
        for kind, names in (
            *(("bf16 skinny", (name,)) for name in SHAPES),
            *((kind, LAYER) for kind in ("bf16 skinny", "int4", "int8", "fp8")),
        )
    ]
    prefill = [_timing(device, kind, (name,), 4096) for kind in ("int4", "int8", "fp8") for name in LAYER]
    x_bytes = 4096 * 4096
    quantize = Timing("quantize_fp8 T4096 4096", partial(_bind_quantize, device), 3 * x_bytes)
    return [*decode, *prefill, quantize]


def _timing(
    device: torch.device, kind: str, names: tuple[str, ...], num_tokens: int, bar: float | None = None
) -> Timing:
    sizes = [SHAPES[name] for name in names]
    weights = _copies(kind, names) * sum(rows * columns for rows, columns in sizes)
    inputs = _copies(kind, names) * 2 * num_tokens * sum(rows + columns for rows, columns in sizes)
    operations = 2 * num_tokens * weights
    rivals = {"F.linear": partial(_bind, "bf16", device, names, num_tokens)}
    if kind == "fp8":
        rivals["torch._scaled_mm"] = partial(_bind, "torch fp8", device, names, num_tokens)
    return Timing(
        f"matmul {kind} {' '.join(names)} T{num_tokens}",
        partial(_bind, kind, device, names, num_tokens),
        int(weights * BYTES[kind]) + inputs,
        # At the rate of 16-bit products; those of float8 are twice as fast.
        operations // 2 if kind == "fp8" else operations,
        {name: rival for name, rival in rivals.items() if num_tokens <= FEW_TOKENS or kind != "bf16 skinny"},
        bar,
    )


def _copies(kind: str, names: tuple[str, ...]) -> int:
    """How often weights come, so that they are not in the cache when they come again."""
    num_bytes = BYTES[kind] * sum(SHAPES[name][0] * SHAPES[name][1] for name in names)
    return max(1, math.ceil(CACHE_BYTES / num_bytes))


def _bind(
    kind: str, device: torch.device, names: tuple[str, ...], num_tokens: int, config: Config | None = None
) -> Callable[[], torch.Tensor]:
    """All weights, one product after the other."""
    weights = _weights(kind, device, names)
    xs = {size: _x(kind, num_tokens, size, device) for _, size in (SHAPES[name] for name in names)}
    calls = [CALLS[kind](weight, xs[SHAPES[name][1]], config) for name, weight in weights]

    def run() -> torch.Tensor:
        for call in calls[:-1]:
            call()
        return calls[-1]()

    return run


def _x(kind: str, num_tokens: int, size: int, device: torch.device) -> Any:
    x = torch.randn((num_tokens, size), dtype=torch.bfloat16, device=device)
    return quantize_fp8(x) if kind in ("fp8", "torch fp8") else x


@lru_cache(maxsize=1)
def _weights(kind: str, device: torch.device, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Kept for the next candidate, which has the same."""
    return [(name, MAKERS[kind](device, *SHAPES[name])) for _ in range(_copies(kind, names)) for name in names]


def _make_dense(device: torch.device, out_features: int, in_features: int) -> Any:
    weight = torch.randn((out_features, in_features), dtype=torch.bfloat16, device=device)
    return weight, make_counters(out_features, device)


def _make_int4(device: torch.device, out_features: int, in_features: int) -> PackedWeight:
    values = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    scales = torch.rand((out_features, in_features // 128), device=device)
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=device)
    return pack_weight(Int4Weight(values, scales, zeros))


def _make_int8(device: torch.device, out_features: int, in_features: int) -> PackedWeight:
    values = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=device)
    return pack_weight(Int8Weight(values, torch.rand((out_features, 1), device=device)))


def _make_fp8(device: torch.device, out_features: int, in_features: int) -> PreparedFp8:
    values = torch.randn((out_features, in_features), device=device) * 100
    values = values.clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return prepare_fp8(Fp8Weight(values, torch.rand(out_features, device=device)))


MAKERS: Final[dict[str, Callable[[torch.device, int, int], Any]]] = {
    "bf16": _make_dense,
    "bf16 skinny": _make_dense,
    "int4": _make_int4,
    "int8": _make_int8,
    "fp8": _make_fp8,
    "torch fp8": _make_fp8,
}
# Of a weight, x and the config.
CALLS: Final[dict[str, Callable[[Any, Any, Config | None], Callable[[], torch.Tensor]]]] = {
    "bf16": lambda weight, x, config: lambda: F.linear(x, weight[0]),
    "bf16 skinny": lambda weight, x, config: (
        lambda: matmul_skinny.matmul_skinny(x, weight[0], weight[1], config=config)
    ),
    "int4": lambda weight, x, config: lambda: matmul_weight_only.matmul_weight_only(x, weight, config=config),
    "int8": lambda weight, x, config: lambda: matmul_weight_only.matmul_weight_only(x, weight, config=config),
    "fp8": lambda weight, x, config: lambda: matmul_fp8.matmul_fp8(x, weight, torch.bfloat16, config=config),
    "torch fp8": lambda weight, x, config: lambda: _scaled_mm(x, weight),
}


def _scaled_mm(x: tuple[torch.Tensor, torch.Tensor], weight: PreparedFp8) -> torch.Tensor:
    """The library's, with the same scales."""
    values, scales = x
    return torch._scaled_mm(
        values,
        weight.values.t(),
        scales[:, None],
        weight.scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _bind_quantize(device: torch.device) -> Callable[[], object]:
    x = torch.randn((4096, 4096), dtype=torch.bfloat16, device=device)
    return lambda: quantize_fp8(x)
