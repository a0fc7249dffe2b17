"""Paged attention and latent attention: what reads the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
import triton

from lab.gpu.attention_steps import (
    LatentShape,
    LatentStep,
    Lengths,
    Shape,
    Step,
    make_latent_step,
    make_step,
    random_batch,
)
from lab.gpu.case import Check, CompileCase, Timing, Tuning, compile_case, relative_error
from worker_svc.kernels import mla_attention as mla
from worker_svc.kernels import paged_attention as paged
from worker_svc.kernels import split_kv
from worker_svc.kernels.tuning import Config
from worker_svc.kernels.varlen import Launch, StepKind, plan_launch

H, KH, D = 32, 8, 128  # of Llama-3-8B
INT8, FP8 = torch.int8, torch.float8_e4m3fn
LLAMA = Shape(H, KH, D)
SHAPES = {
    "llama-3-8b": LLAMA,
    "llama-3.2-1b": Shape(32, 8, 64),
    "qwen2-7b": Shape(28, 4, 128),
    "phi-3-mini": Shape(32, 32, 96),
    "gemma-2-9b": Shape(16, 8, 256, window=4096, soft_cap=50.0),
    "mistral-7b": Shape(32, 8, 128, window=4096),
    "int8": replace(LLAMA, kv_dtype=INT8),
    "fp8": replace(LLAMA, kv_dtype=FP8),
}
DEEPSEEK_LITE = LatentShape(16, 512, 64)
DEEPSEEK = LatentShape(128, 512, 64)
TRITON_TYPES = {torch.bfloat16: "bf16", INT8: "i8", FP8: "fp8e4nv"}
KINDS: tuple[StepKind, ...] = ("decode", "mixed", "prefill")


def compile_cases() -> list[CompileCase]:
    """Every shape for each kind of step, Llama's also without splits; and the merge."""
    cases = [_paged_case(name, shape, kind, True) for name, shape in SHAPES.items() for kind in KINDS]
    cases += [_paged_case("llama-3-8b", LLAMA, kind, False) for kind in KINDS]
    cases += [_latent_case(DEEPSEEK_LITE, "decode"), *[_latent_case(it, "prefill") for it in (DEEPSEEK_LITE, DEEPSEEK)]]
    return [*cases, _merge_case("llama-3-8b", 16, 64, H, KH, D), _merge_case("deepseek-v2-lite", 16, 32, 16, 1, 512)]


POINTERS = {"block_tables_ptr": "*i32", "cu_seqlens_ptr": "*i32", "seq_lens_ptr": "*i32", "out_ptr": "*bf16"}
PARTIALS = {"partial_ptr": "*fp32", "lse_ptr": "*fp32"}
# In elements, of whole rows of heads: multiples of 16.
STRIDES = ("q_stride_token", "q_stride_head", "kv_stride_head", "kv_stride_slot", "scales_stride", "cache_stride_slot")
NUMBERS = {"num_tokens": "i32", "num_sequences": "i32", "table_stride": "i32", "softmax_scale": "fp32"}


def _launch(num_heads: int, num_kv_heads: int, block_m: int, is_split: bool) -> Launch:
    """64 programs of the grid are for splits, about as many as on an H200 with 8 KV heads."""
    batch = random_batch(torch.device("cpu"), ([1] * 64, [1024] * 64))
    return replace(plan_launch(batch, 64, num_heads, num_kv_heads, block_m, None), num_extra=64 * is_split)


def _paged_case(name: str, shape: Shape, kind: StepKind, is_split: bool) -> CompileCase:
    config = paged.default_config(kind, shape.head_dim, torch.bfloat16)
    strides = dict.fromkeys(STRIDES[:5], "i32")
    arguments = POINTERS | NUMBERS | strides | {"q_ptr": "*bf16", "kv_ptr": f"*{TRITON_TYPES[shape.kv_dtype]}"}
    arguments |= PARTIALS if is_split else {}
    arguments |= {"scales_ptr": "*fp32"} if shape.kv_dtype in paged.QUANTIZED else {}
    constants = {
        "NUM_HEADS": shape.num_heads,
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "WINDOW": shape.window,
        "SOFT_CAP": shape.soft_cap,
        "BLOCK_D": triton.next_power_of_2(shape.head_dim),
        **_launch(shape.num_heads, shape.num_kv_heads, config.blocks["BLOCK_M"], is_split).constants(),
    }
    name = f"paged_attention {name} {kind}{' split' if is_split else ''}"
    return compile_case(name, paged._paged_attention_kernel, arguments, constants, config, STRIDES)


def _latent_case(shape: LatentShape, kind: StepKind) -> CompileCase:
    config = mla.default_config(kind, torch.bfloat16)
    constants = {
        "NUM_HEADS": shape.num_heads,
        "LATENT_DIM": shape.latent_dim,
        "ROPE_DIM": shape.rope_dim,
        "BLOCK_R": shape.latent_dim,
        "BLOCK_P": shape.rope_dim,
        **_launch(shape.num_heads, 1, config.blocks["BLOCK_M"], True).constants(),
    }
    strides = {"q_stride_token": "i32", "q_stride_head": "i32", "cache_stride_slot": "i32"}
    arguments = POINTERS | PARTIALS | NUMBERS | strides | {"q_ptr": "*bf16", "cache_ptr": "*bf16"}
    name = f"mla_attention H{shape.num_heads} {kind}"
    return compile_case(name, mla._mla_attention_kernel, arguments, constants, config, STRIDES)


def _merge_case(name: str, block_m: int, block_n: int, num_heads: int, num_kv_heads: int, dim: int) -> CompileCase:
    config = Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_S": 32, "BLOCK_D": 128})
    constants = {"NUM_HEADS": num_heads, "GROUP": num_heads // num_kv_heads, "VALUE_DIM": dim, "WINDOW": None}
    constants |= _launch(num_heads, num_kv_heads, block_m, True).constants()
    arguments = POINTERS | PARTIALS | {"num_sequences": "i32"}
    return compile_case(f"merge {name}", split_kv._merge_kernel, arguments, constants, config)


STEPS: dict[str, Lengths] = {
    "decode": ([1] * 9, [1, 16, 17, 100, 511, 512, 513, 2000, 9000]),
    "verify": ([5] * 4, [5, 100, 1000, 5000]),
    "mixed": ([1, 300, 1, 0, 17], [5000, 700, 1, 0, 17]),
    "prefill": ([1000, 1537], [1000, 5000]),
}
REASON = "weights are rounded to bfloat16, by 2^-9 each, and the output again; sums are not"


def checks(device: torch.device) -> list[Check]:
    """Every shape in two kinds of step, Llama's in all, against the reference in float64; unowned memory is NaN."""
    shapes: dict[str, Shape | LatentShape] = {f"paged_attention {name}": shape for name, shape in SHAPES.items()}
    shapes |= {f"mla_attention H{shape.num_heads}": shape for shape in (DEEPSEEK_LITE, DEEPSEEK)}
    return [
        Check(f"{name} {step}", partial(_error, device, lengths, shape), 0.01, REASON)
        for name, shape in shapes.items()
        for step, lengths in STEPS.items()
        if step in ("decode", "mixed") or shape is LLAMA
    ]


def _make(device: torch.device, lengths: Lengths, shape: Shape | LatentShape) -> Step | LatentStep:
    return make_step(device, lengths, shape) if isinstance(shape, Shape) else make_latent_step(device, lengths, shape)


def _error(device: torch.device, lengths: Lengths, shape: Shape | LatentShape) -> float:
    step = _make(device, lengths, shape)
    return relative_error(step.attend(), step.expected())


DECODE: Lengths = ([1] * 64, [4096] * 64)
MIXED: Lengths = ([512] + [1] * 63, [8192] + [2048] * 63)
PREFILL: Lengths = ([8192], [8192])


def tunings(device: torch.device) -> list[Tuning]:
    """Each kind of step of Llama-3-8B, its decode over a quantized cache, and latent attention."""
    steps: list[tuple[StepKind, Lengths, torch.dtype]] = [
        ("decode", DECODE, torch.bfloat16),
        ("decode", DECODE, INT8),
        ("decode", DECODE, FP8),
        ("mixed", MIXED, torch.bfloat16),
        ("prefill", PREFILL, torch.bfloat16),
    ]
    latent_steps: list[tuple[StepKind, Lengths]] = [("decode", DECODE), ("prefill", ([2048], [2048]))]
    attends = [
        Tuning(
            "paged_attention",
            paged.tuning_key(kind, D, dtype),
            CANDIDATES[kind],
            partial(_bound, device, lengths, replace(LLAMA, kv_dtype=dtype)),
        )
        for kind, lengths, dtype in steps
    ]
    return attends + [
        Tuning(
            "mla_attention",
            mla.tuning_key(kind, DEEPSEEK_LITE.num_heads, torch.bfloat16),
            LATENT_CANDIDATES[kind],
            partial(_bound, device, lengths, DEEPSEEK_LITE),
        )
        for kind, lengths in latent_steps
    ]


def _configs(*sizes: tuple[int, int, int, int]) -> list[Config]:
    return [Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in sizes]


# BLOCK_M, BLOCK_N, warps, stages.
CANDIDATES: dict[StepKind, list[Config]] = {
    "decode": _configs(
        *[(16, 32, 4, 4), (16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 4, 4), (16, 64, 8, 3), (16, 128, 4, 2)],
        *[(16, 128, 8, 2)],
    ),
    "mixed": _configs((32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3)),
    "prefill": _configs(
        *[(64, 64, 4, 3), (128, 32, 8, 4), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)],
    ),
}
LATENT_CANDIDATES: dict[StepKind, list[Config]] = {
    "decode": _configs((16, 32, 4, 2), (16, 32, 4, 3), (16, 32, 8, 3), (16, 64, 8, 2)),
    "prefill": _configs((16, 64, 8, 2), (32, 32, 8, 3), (32, 64, 8, 2), (64, 32, 8, 2)),
}


def _bound(
    device: torch.device, lengths: Lengths, shape: Shape | LatentShape, config: Config | None = None
) -> Callable[[], object]:
    return partial(_make(device, lengths, shape).attend, config)


def timings(device: torch.device) -> list[Timing]:
    """Steps of one layer of Llama-3-8B and of DeepSeek-V2-lite."""
    return [
        _decode_timing(device, "B64 4k", DECODE, bar=0.85),
        _decode_timing(device, "B64 1k", ([1] * 64, [1024] * 64)),
        _decode_timing(device, "B1 32k", ([1], [32768])),
        _decode_timing(device, "B64 one 32k, others 1k", ([1] * 64, [32768] + [1024] * 63)),
        _decode_timing(device, "B64 4k int8", DECODE, dtype=INT8),
        _decode_timing(device, "B64 4k fp8", DECODE, dtype=FP8),
        _prefill_timing(device, "prefill 8k", 8192, 8192),
        _prefill_timing(device, "chunk of 512 after 32k", 512, 32768),
        _latent_timing(device, "B64 4k", DECODE),
        _latent_timing(device, "B1 32k", ([1], [32768])),
    ]


def _decode_timing(
    device: torch.device, name: str, lengths: Lengths, bar: float | None = None, dtype: torch.dtype = torch.bfloat16
) -> Timing:
    num_sequences, seq_lens = len(lengths[1]), lengths[1]
    slot_bytes = 2 * KH * (D * dtype.itemsize + (4 if dtype in paged.QUANTIZED else 0))
    has_rival = len(set(seq_lens)) == 1 and dtype == torch.bfloat16
    return Timing(
        f"paged_attention decode {name}",
        partial(_bound, device, lengths, replace(LLAMA, kv_dtype=dtype)),
        sum(seq_lens) * slot_bytes + 2 * num_sequences * H * D * 2,
        rivals={"sdpa, dense": partial(_sdpa, device, num_sequences, 1, seq_lens[0])} if has_rival else {},
        bar=bar,
    )


def _prefill_timing(device: torch.device, name: str, num_queries: int, num_keys: int) -> Timing:
    is_whole = num_queries == num_keys
    num_seen = num_queries * num_keys - num_queries * (num_queries - 1) // 2
    return Timing(
        f"paged_attention {name}",
        partial(_bound, device, ([num_queries], [num_keys]), LLAMA),
        2 * (2 * KH * num_keys + 2 * H * num_queries) * D,
        4 * H * D * num_seen,
        rivals={"sdpa flash": partial(_sdpa, device, 1, num_queries, num_keys)} if is_whole else {},
    )


def _latent_timing(device: torch.device, name: str, lengths: Lengths) -> Timing:
    shape, num_keys = DEEPSEEK_LITE, sum(lengths[1])
    row = 2 * shape.latent_dim + shape.rope_dim
    return Timing(
        f"mla_attention decode {name}",
        partial(_bound, device, lengths, shape),
        2 * num_keys * (shape.latent_dim + shape.rope_dim) + 2 * sum(lengths[0]) * shape.num_heads * row,
        2 * num_keys * shape.num_heads * row,
    )


def _sdpa(device: torch.device, num_sequences: int, num_queries: int, num_keys: int) -> Callable[[], object]:
    """Torch's own, on keys and values that lie together; causal where there are as many queries as keys."""
    q = torch.randn(num_sequences, H, num_queries, D, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(num_sequences, KH, num_keys, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=num_queries == num_keys, enable_gqa=True)
