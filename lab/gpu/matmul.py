"""Linear layers at the shapes of Llama-3-8B: 16-bit weights for few tokens, weights of 8 and 4 bits, float8.

Tunings and timings are in `matmul_times`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F

from lab.gpu.case import Check, CompileCase, compile_case, relative_error
from lab.gpu.matmul_times import MULTIPROCESSORS, SHAPES, timings, tunings
from worker_svc.kernels import matmul_fp8, matmul_skinny, matmul_weight_only
from worker_svc.kernels.matmul_fp8 import prepare_fp8, quantize_fp8
from worker_svc.kernels.matmul_tile import make_counters, plan_launch
from worker_svc.kernels.packed_weight import PackedWeight, pack_weight
from worker_svc.kernels.tuning import Config
from worker_svc.quantization import dequantize, quantize_int4, quantize_int8
from worker_svc.quantization import quantize_fp8 as quantize_weight_fp8

__all__ = ["checks", "compile_cases", "timings", "tunings"]

ROUNDED_ONCE: Final = "the result is rounded to bfloat16, by 2^-9 at most"
ROUNDED_TWICE: Final = "weights with their scales and the result are rounded to bfloat16, by 2^-9 each at most"
FLOAT8_SUMS: Final = "the matrix unit keeps about 14 bits of a sum of float8 products"

_STRIDES = ("x_stride", "weight_stride", "y_stride", "residual_stride", "scales_stride", "split_size", "OUT", "K")
_OUTPUT = {"y_ptr": "*bf16", "y_stride": "i32", "residual_ptr": "*bf16", "residual_stride": "i32"}
_SIZES = {"T": "i32", "OUT": "i32", "K": "i32", "split_size": "i32", "counters_ptr": "*i32"}


def compile_cases() -> list[CompileCase]:
    """The default blocks at each shape, and every branch."""
    return [*_skinny_cases(), *_weight_only_cases(), *_fp8_cases()]


def _skinny_cases() -> list[CompileCase]:
    cases = []
    for shape, num_tokens, dtype in (
        *((SHAPES[name], num_tokens, "bf16") for name in SHAPES for num_tokens in (1, 16, 64)),
        ((640, 250), 1, "bf16"),  # a remainder of columns
        (SHAPES["o"], 1, "fp16"),
        (SHAPES["o"], 1, "fp32"),
        (SHAPES["o"], 64, "fp32"),
    ):
        weight = torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        config = matmul_skinny.default_config(num_tokens, weight, MULTIPROCESSORS)
        launch = plan_launch(num_tokens, *shape, config, MULTIPROCESSORS)
        arguments = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "x_stride": "i32", "weight_stride": "i32"}
        arguments |= _outputs(dtype, launch.splits)
        constants = {"IS_EVEN": shape[1] % config.blocks["BLOCK_K"] == 0, "SPLITS": launch.splits}
        name = f"matmul_skinny {shape[0]}x{shape[1]} T{num_tokens} {dtype}"
        aligned = _STRIDES if constants["IS_EVEN"] else ()
        kernel = matmul_skinny._matmul_skinny_kernel
        cases.append(compile_case(name, kernel, arguments, constants, config, aligned))
    return cases


_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _outputs(dtype: str, splits: int, has_bias: bool = False) -> dict[str, str]:
    arguments = _OUTPUT | _SIZES | {"y_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}"}
    if splits > 1:
        arguments["partials_ptr"] = "*fp32"
    return arguments | ({"bias_ptr": f"*{dtype}"} if has_bias else {})


def _weight_only_cases() -> list[CompileCase]:
    kinds = (
        *((SHAPES[name], 4, 128, num_tokens, "bf16") for name in SHAPES for num_tokens in (1, 16, 64, 4096)),
        *((SHAPES["gate_up"], 8, 4096, num_tokens, "bf16") for num_tokens in (1, 16, 64, 4096)),
        *((SHAPES["o"], 8, group, num_tokens, "bf16") for group in (128, 32) for num_tokens in (1, 4096)),
        *((SHAPES["o"], 4, group, num_tokens, "bf16") for group in (32, 64, 4096) for num_tokens in (1, 4096)),
        ((640, 864), 4, 864, 1, "bf16"),  # a remainder of columns
        *((SHAPES["o"], bits, 128, 1, dtype) for bits in (4, 8) for dtype in ("fp16", "fp32")),
        (SHAPES["o"], 4, 128, 4096, "fp32"),
    )
    return [_weight_only_case(*kind) for kind in kinds]


def _weight_only_case(shape: tuple[int, int], bits: int, group_size: int, num_tokens: int, dtype: str) -> CompileCase:
    scales = torch.empty((shape[1] // group_size, shape[0]), dtype=torch.int32, device="meta")
    weight = PackedWeight(bits, *shape, group_size, words=scales, scales=scales, counters=scales)
    config = matmul_weight_only.default_config(num_tokens, weight, _DTYPES[dtype], MULTIPROCESSORS)
    launch = plan_launch(num_tokens, *shape, config, MULTIPROCESSORS)
    arguments = {"x_ptr": f"*{dtype}", "x_stride": "i32", "words_ptr": "*i32", "scales_ptr": "*i32", "magic": "i32"}
    arguments |= {"scales_stride": "i32", "column_tiles": "i32"} | _outputs(dtype, launch.splits)
    constants = {
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "SCALING": weight.scaling(num_tokens),
        "IS_EVEN": shape[1] % config.blocks["BLOCK_K"] == 0,
        "SPLITS": launch.splits,
    }
    name = f"matmul_weight_only int{bits} groups of {group_size} {shape[0]}x{shape[1]} T{num_tokens} {dtype}"
    kernel = matmul_weight_only._matmul_weight_only_kernel
    return compile_case(name, kernel, arguments, constants, config, _STRIDES)


def _fp8_cases() -> list[CompileCase]:
    cases = []
    for name, num_tokens in ((name, num_tokens) for name in SHAPES for num_tokens in (1, 64, 128, 4096)):
        shape = SHAPES[name]
        config = matmul_fp8.default_config(num_tokens)
        launch = plan_launch(num_tokens, *shape, config, MULTIPROCESSORS)
        block_t, block_n, block_k = (config.blocks[name] for name in ("BLOCK_T", "BLOCK_N", "BLOCK_K"))
        arguments = {"x": f"tensordesc<fp8e4nv[{block_t}, {block_k}]>", "x_scales_ptr": "*fp32"}
        arguments |= {"weight": f"tensordesc<fp8e4nv[{block_n}, {block_k}]>", "weight_scales_ptr": "*fp32"}
        arguments |= _outputs("bf16", launch.splits, has_bias=True)
        constants = {"ADDS_WIDE": num_tokens <= 64, "SPLITS": launch.splits}
        title = f"matmul_fp8 {shape[0]}x{shape[1]} T{num_tokens}"
        cases.append(compile_case(title, matmul_fp8._matmul_fp8_kernel, arguments, constants, config, _STRIDES))
    pointers = {"x_ptr": "*bf16", "values_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "x_stride": "i32"}
    for size, block, num_warps in ((4096, 4096, 8), (14336, 16384, 32)):
        config = Config({"BLOCK": block}, num_warps)
        kernel = matmul_fp8._quantize_fp8_kernel
        cases.append(compile_case(f"quantize_fp8 {size}", kernel, pointers, {"SIZE": size}, config, ("x_stride",)))
    return cases


def checks(device: torch.device) -> list[Check]:
    """Each op against float32, at odd numbers of tokens, with all that may be added."""
    skinny = [
        Check(f"matmul_skinny T{num_tokens}", partial(_skinny_error, device, num_tokens), 0.004, ROUNDED_ONCE)
        for num_tokens in (1, 13, 64)
    ]
    packed = [
        Check(
            f"matmul_weight_only {name} T{num_tokens}",
            partial(_packed_error, device, quantize, num_tokens),
            0.004 if num_tokens <= 64 or quantize is quantize_int8 else 0.006,
            ROUNDED_ONCE if num_tokens <= 64 or quantize is quantize_int8 else ROUNDED_TWICE,
        )
        for name, quantize in (("int4", quantize_int4), ("int8", quantize_int8))
        for num_tokens in (1, 13, 64, 301)
    ]
    fp8 = [
        Check(f"matmul_fp8 T{num_tokens}", partial(_fp8_error, device, num_tokens), 0.01, FLOAT8_SUMS)
        for num_tokens in (1, 13, 64, 301)
    ]
    quantized = Check("quantize_fp8", partial(_quantize_error, device), 0.005, "a few roundings go the other way")
    return [
        *skinny,
        *packed,
        *fp8,
        quantized,
        Check("matmul_skinny, the same each time", partial(_differences, device), 0.0, "parts are added up in order"),
    ]


def _randn(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _skinny_error(device: torch.device, num_tokens: int) -> float:
    (size, in_features), weight = SHAPES["o"], _randn(*SHAPES["o"], device=device)
    x, bias, residual = (
        _randn(*shape, device=device) for shape in ((num_tokens, in_features), (size,), (num_tokens, size))
    )
    y = matmul_skinny.matmul_skinny(x, weight, make_counters(size, device), bias, residual)
    wide = (tensor.float() for tensor in (x, weight, bias, residual))
    return relative_error(y, matmul_skinny.matmul_skinny_reference(*wide))


def _packed_error(device: torch.device, quantize: Callable[[torch.Tensor], Any], num_tokens: int) -> float:
    size, in_features = SHAPES["o"]
    weight = quantize(_randn(size, in_features, device=device))
    x, bias = _randn(num_tokens, in_features, device=device), _randn(size, device=device)
    y = matmul_weight_only.matmul_weight_only(x, pack_weight(weight), bias)
    expected = matmul_weight_only.matmul_weight_only_reference(x.float(), weight, bias.float())
    return relative_error(y, expected)


def _fp8_error(device: torch.device, num_tokens: int) -> float:
    size, in_features = SHAPES["down"]
    weight = quantize_weight_fp8(_randn(size, in_features, device=device))
    x = quantize_fp8(_randn(num_tokens, in_features, device=device))
    y = matmul_fp8.matmul_fp8(x, prepare_fp8(weight), torch.bfloat16)
    return relative_error(y, F.linear(x[0].float() * x[1][:, None], dequantize(weight)))


def _quantize_error(device: torch.device) -> float:
    x = _randn(301, 14336, device=device)
    values, scales = quantize_fp8(x)
    expected, expected_scales = matmul_fp8.quantize_fp8_reference(x)
    return max(relative_error(values.float(), expected.float()), relative_error(scales, expected_scales))


def _differences(device: torch.device) -> float:
    """Split sums are added up in order, whichever program comes last."""
    (size, in_features), weight = SHAPES["o"], _randn(*SHAPES["o"], device=device)
    x, counters = _randn(16, in_features, device=device), make_counters(size, device)
    first = matmul_skinny.matmul_skinny(x, weight, counters)
    return max(relative_error(matmul_skinny.matmul_skinny(x, weight, counters), first) for _ in range(20))
