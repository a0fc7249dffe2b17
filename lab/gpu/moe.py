"""Mixtures of experts: routing and grouped matmuls at the shapes of Mixtral-8x7B and Qwen3-30B-A3B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
import triton

from lab.gpu.case import Check, CompileCase, Timing, Tuning, compile_case, relative_error
from lab.gpu.matmul_times import MULTIPROCESSORS
from worker_svc.kernels import grouped_matmul, moe_routing
from worker_svc.kernels.grouped_matmul import Experts, Fp8Experts, block_rows, grouped_matmul_reference
from worker_svc.kernels.matmul_fp8 import quantize_fp8
from worker_svc.kernels.moe_routing import Alignment, Routing, align, route
from worker_svc.kernels.packed_weight import PackedWeight, pack_weight
from worker_svc.kernels.tuning import Config
from worker_svc.quantization import FP8, QUANTIZERS, Fp8Weight, dequantize

ROUNDED: Final = "the result is rounded to bfloat16, by 2^-9 at most"
FLOAT8_SUMS: Final = "the matrix unit keeps about 14 bits of a sum of float8 products"


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer of experts."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    inner: int

    @property
    def gate_up(self) -> tuple[int, int]:
        return 2 * self.inner, self.hidden_size

    @property
    def down(self) -> tuple[int, int]:
        return self.hidden_size, self.inner


MIXTRAL: Final = Shape("Mixtral", 8, 2, 4096, 14336)
QWEN: Final = Shape("Qwen3", 128, 8, 2048, 768)
SMALL: Final = Shape("odd", 5, 3, 640, 192)
DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_cases() -> list[CompileCase]:
    """The default blocks at each shape, and every branch."""
    return [*_routing_cases(), *_grouped_cases()]


def _routing_cases() -> list[CompileCase]:
    cases = []
    for shape in (MIXTRAL, QWEN):
        experts, top_k = shape.num_experts, shape.top_k
        for scoring in ("softmax", "sigmoid"):
            arguments = {"logits_ptr": "*bf16", "logits_stride": "i32", "experts_ptr": "*i32", "weights_ptr": "*fp32"}
            arguments |= {"T": "i32", "factor": "fp32"} | ({"bias_ptr": "*fp32"} if scoring == "sigmoid" else {})
            constants = {"NUM_EXPERTS": experts, "TOP_K": top_k, "IS_SOFTMAX": scoring == "softmax"}
            constants |= {"RENORMALIZES": scoring == "softmax", "BLOCK_TOP": triton.next_power_of_2(top_k)}
            config = Config({"BLOCK_T": 4, "BLOCK_X": experts})
            name = f"route {scoring} {top_k} of {experts}"
            cases.append(compile_case(name, moe_routing._route_kernel, arguments, constants, config))
        for num_pairs in (top_k, 4096 * top_k):
            config = Config(moe_routing.chunk_sizes(num_pairs, experts))
            arguments = {"experts_ptr": "*i32", "pairs_ptr": "*i32", "tile_experts_ptr": "*i32"}
            arguments |= dict.fromkeys(("P", "num_chunks", "num_tiles"), "i32")
            arguments |= {"counts_ptr": "*i32"} if num_pairs > config.blocks["CHUNK"] else {}
            constants = {"NUM_EXPERTS": experts, "BLOCK_T": block_rows(num_pairs, experts)}
            name = f"align {num_pairs} pairs {experts} experts"
            cases.append(compile_case(name, moe_routing._align_kernel, arguments, constants, config))
        counts = {"experts_ptr": "*i32", "counts_ptr": "*i32", "P": "i32"}
        name = f"align counts {experts} experts"
        cases.append(compile_case(name, moe_routing._count_kernel, counts, {}, _counting(config)))
    pointers = {"y_ptr": "*bf16", "residual_ptr": "*bf16", "residual_stride": "i32", "out_ptr": "*bf16"}
    constants = {"SIZE": 4096, "TOP_K": 2}
    sums = compile_case("sum_pairs", grouped_matmul._sum_pairs_kernel, pointers, constants, Config({"BLOCK": 1024}))
    return [*cases, sums]


def _counting(config: Config) -> Config:
    return Config({name: config.blocks[name] for name in ("CHUNK", "BLOCK_P", "BLOCK_X")})


def _grouped_cases() -> list[CompileCase]:
    return [
        _grouped_case(shape, matrix, kind, num_tokens, dtype)
        for shape, kinds, dtype in (
            (MIXTRAL, ("dense", "int8", "int4", "fp8"), "bf16"),
            (QWEN, ("dense", "int4"), "bf16"),
            (SMALL, ("dense", "int8", "int4"), "fp32"),
        )
        for kind in kinds
        for matrix in ("gate_up", "down")
        for num_tokens in (1, 64, 4096)
    ]


def _grouped_case(shape: Shape, matrix: str, kind: str, num_tokens: int, dtype: str) -> CompileCase:
    out_features, in_features = shape.gate_up if matrix == "gate_up" else shape.down
    weight = _meta_experts(kind, shape.num_experts, out_features, in_features, DTYPES[dtype])
    alignment = _meta_alignment(shape, num_tokens)
    x = "fp8e4nv" if kind == "fp8" else dtype
    x_dtype = FP8 if kind == "fp8" else DTYPES[dtype]
    config = grouped_matmul.default_config(weight, alignment, out_features, x_dtype, MULTIPROCESSORS)
    arguments = {"x_ptr": f"*{x}", "pairs_ptr": "*i32", "tile_experts_ptr": "*i32", "y_ptr": f"*{dtype}"}
    arguments |= dict.fromkeys(("x_stride", "num_tiles", "P", "OUT", "K"), "i32")
    constants: dict[str, Any] = {"PAIRS_PER_ROW": shape.top_k if matrix == "gate_up" else 1}
    constants["IS_EVEN"] = in_features % config.blocks["BLOCK_K"] == 0
    if matrix == "down":
        arguments["pair_weights_ptr"] = "*fp32"
    if isinstance(weight, PackedWeight):
        arguments |= {"words_ptr": "*i32", "scales_ptr": "*i32"}
        arguments |= dict.fromkeys(("scales_stride", "column_tiles", "magic"), "i32")
        constants |= {"BITS": weight.bits, "GROUP_SIZE": weight.group_size}
        constants["SCALING"] = weight.scaling(alignment.block_t)
    else:
        arguments["weight_ptr"] = f"*{x}"
    if kind == "fp8":
        arguments |= {"weight_scales_ptr": "*fp32", "x_scales_ptr": "*fp32"}
    name = f"grouped_matmul {shape.name} {matrix} {kind} T{num_tokens} {dtype}"
    aligned = ("x_stride", "OUT", "K", "scales_stride")
    return compile_case(name, grouped_matmul._grouped_matmul_kernel, arguments, constants, config, aligned)


def _meta_experts(kind: str, num_experts: int, out_features: int, in_features: int, dtype: torch.dtype) -> Experts:
    """Shapes alone. The groups of int4: of 128 columns, or all."""
    meta = torch.device("meta")
    if kind in ("int4", "int8"):
        group_size = 128 if kind == "int4" and in_features % 128 == 0 else in_features
        scales = torch.empty((in_features // group_size, num_experts * out_features), device=meta)
        return PackedWeight(int(kind[3:]), num_experts * out_features, in_features, group_size, scales, scales, scales)
    values = torch.empty((num_experts, out_features, in_features), dtype=dtype, device=meta)
    return Fp8Experts(values, values) if kind == "fp8" else values


def _meta_alignment(shape: Shape, num_tokens: int) -> Alignment:
    nothing = torch.empty(0, device="meta")
    num_pairs = num_tokens * shape.top_k
    block_t = block_rows(num_pairs, shape.num_experts)
    return Alignment(nothing, nothing, block_t, num_pairs, shape.num_experts)


def checks(device: torch.device) -> list[Check]:
    """A layer's parts against float32, at odd numbers of tokens."""
    grouped = [
        Check(
            f"grouped_matmul {kind} T{num_tokens}",
            partial(_grouped_error, device, kind, num_tokens),
            0.01 if kind == "fp8" else 0.006,
            FLOAT8_SUMS if kind == "fp8" else ROUNDED,
        )
        for kind in ("dense", "int8", "int4", "fp8")
        for num_tokens in (1, 33, 1001)
    ]
    aligned = [
        Check(f"align {num_tokens} tokens", partial(_align_error, device, num_tokens), 0.0, "integers")
        for num_tokens in (1, 33, 5001)
    ]
    return [*grouped, *aligned, Check("route", partial(_route_error, device), 1e-5, "float32 exponentials")]


def _randn(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _routing(device: torch.device, shape: Shape, num_tokens: int) -> tuple[Routing, Alignment]:
    routing = route(_randn(num_tokens, shape.num_experts, device=device), shape.top_k)
    block_t = block_rows(num_tokens * shape.top_k, shape.num_experts)
    return routing, align(routing.experts, shape.num_experts, block_t)


def _route_error(device: torch.device) -> float:
    logits = torch.randn((1001, QWEN.num_experts), device=device)
    routing, expected = route(logits, QWEN.top_k), moe_routing.route_reference(logits, QWEN.top_k)
    return relative_error(routing.weights, expected.weights) + float((routing.experts != expected.experts).any())


def _align_error(device: torch.device, num_tokens: int) -> float:
    routing, alignment = _routing(device, QWEN, num_tokens)
    expected = moe_routing.align_reference(routing.experts.cpu(), QWEN.num_experts, alignment.block_t)
    used = len(expected.tile_experts)
    tiles, pairs = alignment.tile_experts.cpu(), alignment.pairs.cpu()[: len(expected.pairs)]
    is_same = torch.equal(tiles[:used], expected.tile_experts) and torch.equal(pairs, expected.pairs)
    return float(not (is_same and bool((tiles[used:] == -1).all())))


def _grouped_error(device: torch.device, kind: str, num_tokens: int) -> float:
    size, in_features = 1024, 2048
    dense = _randn(MIXTRAL.num_experts, size, in_features, device=device)
    routing, alignment = _routing(device, MIXTRAL, num_tokens)
    x = _randn(routing.experts.numel(), in_features, device=device)
    weight, wide = _experts(kind, dense)
    if not isinstance(weight, Fp8Experts):
        y = grouped_matmul.grouped_matmul(x, weight, alignment, routing.weights)
        return relative_error(y, grouped_matmul_reference(x.float(), wide, routing.experts, routing.weights))
    values, scales = quantize_fp8(x)
    y = grouped_matmul.grouped_matmul(values, weight, alignment, routing.weights, scales, torch.bfloat16)
    x_meant = values.float() * scales[:, None]
    return relative_error(y, grouped_matmul_reference(x_meant, wide, routing.experts, routing.weights))


def _experts(kind: str, dense: torch.Tensor) -> tuple[Experts, torch.Tensor]:
    """A weight for each expert, and what it stands for."""
    if kind == "dense":
        return dense, dense.float()
    quantized = QUANTIZERS[kind](dense.flatten(0, 1))
    wide = dequantize(quantized).view(dense.shape)
    if isinstance(quantized, Fp8Weight):
        return Fp8Experts(quantized.values.view(dense.shape), quantized.scales.view(dense.shape[:2])), wide
    return pack_weight(quantized), wide


def tunings(device: torch.device) -> list[Tuning]:
    """The 16-bit experts of Mixtral, at decode steps and a prefill."""
    return [
        Tuning(
            "grouped_matmul",
            _tuning_key(matrix, num_tokens),
            _candidates(block_rows(num_tokens * MIXTRAL.top_k, MIXTRAL.num_experts)),
            partial(_bind, device, matrix, num_tokens),
        )
        for matrix in ("gate_up", "down")
        for num_tokens in (1, 64, 4096)
    ]


def _tuning_key(matrix: str, num_tokens: int) -> str:
    shape = MIXTRAL.gate_up if matrix == "gate_up" else MIXTRAL.down
    weight = _meta_experts("dense", MIXTRAL.num_experts, *shape, torch.bfloat16)
    return grouped_matmul.tuning_key(weight, _meta_alignment(MIXTRAL, num_tokens))


def _candidates(block_t: int) -> list[Config]:
    blocks = [(16, 256, 4, 4), (32, 128, 4, 5), (64, 64, 4, 5), (64, 128, 4, 3), (128, 64, 4, 4)]
    if block_t >= 64:
        blocks = [(128, 64, 8, 4), (128, 64, 4, 4), (256, 64, 8, 3), (128, 128, 8, 3)]
    return [
        Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps, stages)
        for block_n, block_k, num_warps, stages in blocks
    ]


def timings(device: torch.device) -> list[Timing]:
    """Both matrices of a Mixtral layer; a prefill beside one dense product of as many operations."""
    cases = []
    for matrix in ("gate_up", "down"):
        size, in_features = MIXTRAL.gate_up if matrix == "gate_up" else MIXTRAL.down
        for num_tokens in (1, 64, 4096):
            num_pairs = num_tokens * MIXTRAL.top_k
            # Of the experts that random tokens choose.
            active = MIXTRAL.num_experts * (1 - (1 - MIXTRAL.top_k / MIXTRAL.num_experts) ** num_tokens)
            num_bytes = 2 * int(active * size * in_features) + 2 * num_pairs * (size + in_features)
            name = f"grouped_matmul Mixtral {matrix} T{num_tokens}"
            rivals: dict[str, Any] = {"F.linear": partial(_bind_dense, device, num_pairs, size, in_features)}
            operations = 2 * num_pairs * size * in_features
            cases.append(Timing(name, partial(_bind, device, matrix, num_tokens), num_bytes, operations, rivals))
    routing = [
        Timing(f"route and align Qwen3 T{num_tokens}", partial(_bind_routing, device, num_tokens), num_tokens * 256)
        for num_tokens in (1, 64, 4096)
    ]
    return [*cases, *routing]


def _bind(
    device: torch.device, matrix: str, num_tokens: int, config: Config | None = None
) -> Callable[[], torch.Tensor]:
    size, in_features = MIXTRAL.gate_up if matrix == "gate_up" else MIXTRAL.down
    weight = _randn(MIXTRAL.num_experts, size, in_features, device=device)
    _, alignment = _routing(device, MIXTRAL, num_tokens)
    rows = num_tokens if matrix == "gate_up" else num_tokens * MIXTRAL.top_k
    x = _randn(rows, in_features, device=device)
    return lambda: grouped_matmul.grouped_matmul(x, weight, alignment, config=config)


def _bind_dense(device: torch.device, num_rows: int, size: int, in_features: int) -> Callable[[], torch.Tensor]:
    x, weight = _randn(num_rows, in_features, device=device), _randn(size, in_features, device=device)
    return lambda: F.linear(x, weight)


def _bind_routing(device: torch.device, num_tokens: int) -> Callable[[], object]:
    logits = _randn(num_tokens, QWEN.num_experts, device=device)
    block_t = block_rows(num_tokens * QWEN.top_k, QWEN.num_experts)
    return lambda: align(route(logits, QWEN.top_k).experts, QWEN.num_experts, block_t)
