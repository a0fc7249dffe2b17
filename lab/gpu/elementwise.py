"""Norms, gates, and rotary positions with the KV write: what only moves bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton

from lab.gpu.case import Check, CompileCase, Timing, Tuning, compile_case, relative_error
from worker_svc.kernels import rms_norm, rope_kv_write, rope_latent_write, swiglu
from worker_svc.kernels.rope_kv_write import HeadNorms
from worker_svc.kernels.tuning import Config
from worker_svc.rope import Rope, frequencies, turns

# Llama-3-8B.
E, H, KH, D, INNER = 4096, 32, 8, 128, 14336
# DeepSeek-V2: heads, latent and rotary channels.
LATENT_H, R, P = 128, 512, 64
POSITIONS = 131072
BFLOAT16 = "three roundings to bfloat16, of 2^-9 each at most, against float32"


def compile_cases() -> list[CompileCase]:
    """Every branch at the shapes of Llama-3-8B, Qwen3 (norms of heads) and Phi-3-mini (D = 96)."""
    return [*_norm_cases(), *_rope_cases(), _latent_case(), *_gate_cases()]


def _norm_cases() -> list[CompileCase]:
    cases = []
    for size, weight, adds in ((E, "bf16", True), (E, "bf16", False), (5120, "bf16", True), (2560, "fp32", True)):
        block = triton.next_power_of_2(size)
        pointers = {"x_ptr": "*bf16", "weight_ptr": f"*{weight}", "out_ptr": "*bf16"}
        if adds:
            pointers |= {"residual_ptr": "*bf16", "total_ptr": "*bf16"}
        scalars = {"x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
        name = f"{'add_' if adds else ''}rms_norm E{size} weight {weight}"
        config = rms_norm.default_config(block)
        kernel, strides = rms_norm._rms_norm_kernel, ("x_stride", "residual_stride")
        cases.append(compile_case(name, kernel, pointers | scalars, {"SIZE": size}, config, strides))
    return cases


def _rope_cases() -> list[CompileCase]:
    cases = []
    for kv, head_dim, normed in (
        ("bf16", D, False),
        ("bf16", D, True),
        ("bf16", 96, False),
        ("i8", D, False),
        ("fp8e4nv", D, True),
    ):
        pointers = {"qkv_ptr": "*bf16", "turns_ptr": "*fp32", "slots_ptr": "*i64", "kv_ptr": f"*{kv}"}
        if normed:
            pointers |= {"q_weight_ptr": "*bf16", "k_weight_ptr": "*bf16"}
        if kv != "bf16":
            pointers["kv_scales_ptr"] = "*fp32"
        strides = dict.fromkeys(("qkv_stride", "kv_head_stride", "scales_head_stride"), "i32")
        constants = {
            "NUM_HEADS": H,
            "NUM_KV_HEADS": KH,
            "HEAD_DIM": head_dim,
            "NUM_PAIRS": head_dim // 2,
            "LARGEST": {"bf16": None, "i8": 127.0, "fp8e4nv": 448.0}[kv],
            "BLOCK_D": triton.next_power_of_2(head_dim),
        }
        name = f"rope_kv_write D{head_dim} kv {kv}{' normed' if normed else ''}"
        kernel, config = rope_kv_write._rope_kv_write_kernel, rope_kv_write.DEFAULT
        arguments = pointers | strides | {"eps": "fp32"}
        cases.append(compile_case(name, kernel, arguments, constants, config, tuple(strides)))
    return cases


def _latent_case() -> CompileCase:
    pointers = {f"{name}_ptr": "*bf16" for name in ("q", "latent", "key", "cache")}
    pointers |= {"turns_ptr": "*fp32", "slots_ptr": "*i64"}
    scalars = dict.fromkeys(("q_stride_token", "q_stride_head", "latent_stride", "key_stride"), "i32")
    constants = {"NUM_HEADS": LATENT_H, "LATENT_DIM": R, "ROPE_DIM": P, "BLOCK_R": R, "BLOCK_P": P}
    kernel, config = rope_latent_write._rope_latent_write_kernel, rope_latent_write.DEFAULT
    return compile_case(f"rope_latent_write R{R} P{P}", kernel, pointers | scalars, constants, config, tuple(scalars))


def _gate_cases() -> list[CompileCase]:
    arguments = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride": "i32"}
    return [
        compile_case(
            f"swiglu I{INNER} {'silu' if is_silu else 'gelu_tanh'}",
            swiglu._swiglu_kernel,
            arguments,
            {"SIZE": INNER, "IS_SILU": is_silu},
            swiglu.DEFAULT,
            ("stride",),
        )
        for is_silu in (True, False)
    ]


def checks(device: torch.device) -> list[Check]:
    """Each op against its reference in float32, at odd numbers of tokens."""
    return [
        Check("add_rms_norm", partial(_norm_error, device), 0.01, BFLOAT16),
        Check("swiglu silu", partial(_gate_error, device, "silu"), 0.004, BFLOAT16),
        Check("swiglu gelu_tanh", partial(_gate_error, device, "gelu_tanh"), 0.004, BFLOAT16),
        Check("rope_kv_write bf16", partial(_rope_error, device, torch.bfloat16, False), 0.01, BFLOAT16),
        Check("rope_kv_write bf16 normed", partial(_rope_error, device, torch.bfloat16, True), 0.01, BFLOAT16),
        Check("rope_kv_write int8", partial(_rope_error, device, torch.int8, False), 0.01, "few are off by one"),
        Check("rope_latent_write", partial(_latent_error, device), 0.004, BFLOAT16),
        Check(
            "rope_kv_write fp8",
            partial(_rope_error, device, torch.float8_e4m3fn, False),
            0.01,
            "few are rounded the other way, by 2^-4",
        ),
    ]


def _randn(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _norm_error(device: torch.device) -> float:
    x, residual, weight = _randn(77, E, device=device), _randn(77, E, device=device), _randn(E, device=device)
    outs = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    total = residual.float() + x.float()
    return max(map(relative_error, outs, (rms_norm.rms_norm_reference(total, weight.float(), 1e-5), total)))


def _gate_error(device: torch.device, activation: Any) -> float:
    gate_up = _randn(77, 2 * INNER, device=device)
    return relative_error(swiglu.swiglu(gate_up, activation), swiglu.swiglu_reference(gate_up.float(), activation))


def _rope_error(device: torch.device, kv_dtype: torch.dtype, normed: bool) -> float:
    num_tokens = 77
    qkv, kv, kv_scales = _cache(device, num_tokens, kv_dtype)
    slots = torch.randperm(kv.shape[1], device=device)[:num_tokens]
    norms = HeadNorms(_randn(D, device=device), _randn(D, device=device), 1e-6) if normed else None
    wide = norms and HeadNorms(norms.q_weight.float(), norms.k_weight.float(), norms.eps)
    angles = _angles(device, torch.randint(POSITIONS, (num_tokens,), device=device))
    wide_qkv = qkv.float()
    wide_kv = torch.zeros(kv.shape, device=device) if kv_scales is None else kv.clone()
    wide_scales = None if kv_scales is None else kv_scales.clone()
    expected = rope_kv_write.rope_kv_write_reference(wide_qkv, angles, slots, wide_kv, wide_scales, wide)
    q = rope_kv_write.rope_kv_write(qkv, angles, slots, kv, kv_scales, norms)
    return max(relative_error(q, expected), relative_error(kv.float(), wide_kv.float()))


def _latent_error(device: torch.device) -> float:
    num_tokens = 77
    q, latent, key = (
        _randn(*shape, device=device) for shape in ((num_tokens, LATENT_H, R + P), (num_tokens, R), (num_tokens, P))
    )
    cache = torch.zeros(2 * num_tokens, R + P, dtype=torch.bfloat16, device=device)
    slots = torch.randperm(len(cache), device=device)[:num_tokens]
    angles = _angles(device, torch.randint(POSITIONS, (num_tokens,), device=device), P)
    wide_q, wide_cache = q.float(), cache.float()
    rope_latent_write.rope_latent_write_reference(wide_q, latent.float(), key.float(), angles, slots, wide_cache)
    rope_latent_write.rope_latent_write(q, latent, key, angles, slots, cache)
    return max(relative_error(q, wide_q), relative_error(cache, wide_cache))


def _cache(
    device: torch.device, num_tokens: int, kv_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """QKV of some tokens, a cache that holds them twice, and its scales."""
    qkv = _randn(num_tokens, (H + 2 * KH) * D, device=device)
    kv = torch.zeros(2 * KH, 2 * num_tokens, D, device=device).to(kv_dtype)
    is_quantized = kv_dtype in rope_kv_write.LARGEST
    return qkv, kv, torch.zeros(kv.shape[:2], device=device) if is_quantized else None


def _angles(device: torch.device, positions: torch.Tensor, rotary_dim: int = D) -> torch.Tensor:
    return torch.view_as_real(turns(positions, frequencies(Rope(5e5), rotary_dim).to(device)))[:, 0]


def tunings(device: torch.device) -> list[Tuning]:
    """At 64 tokens, a decode step; a prefill is less particular."""
    return [
        Tuning(
            "rms_norm",
            f"E<={E}",
            [Config({"BLOCK": E}, num_warps) for num_warps in (4, 8, 16)],
            partial(_bound_norm, device),
        ),
        Tuning(
            "rope_kv_write",
            f"D<={D}",
            [Config({"BLOCK": block}, num_warps) for block in (512, 1024, 2048) for num_warps in (2, 4, 8)],
            partial(_bound_rope, device),
        ),
        Tuning(
            "swiglu",
            "",
            [Config({"BLOCK": block}, num_warps) for block in (1024, 2048, 4096) for num_warps in (4, 8)],
            partial(_bound_gate, device),
        ),
    ]


def _bound_norm(device: torch.device, config: Config | None = None, num_tokens: int = 64) -> Callable[[], object]:
    x, residual, weight = (_randn(*shape, device=device) for shape in ((num_tokens, E), (num_tokens, E), (E,)))
    return lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5, config)


def _bound_rope(device: torch.device, config: Config | None = None, num_tokens: int = 64) -> Callable[[], object]:
    qkv, kv, _ = _cache(device, num_tokens, torch.bfloat16)
    slots = torch.randperm(kv.shape[1], device=device)[:num_tokens]
    angles = _angles(device, torch.randint(POSITIONS, (num_tokens,), device=device))
    return lambda: rope_kv_write.rope_kv_write(qkv, angles, slots, kv, config=config)


def _bound_gate(device: torch.device, config: Config | None = None, num_tokens: int = 64) -> Callable[[], object]:
    gate_up = _randn(num_tokens, 2 * INNER, device=device)
    return lambda: swiglu.swiglu(gate_up, config=config)


def timings(device: torch.device) -> list[Timing]:
    """At decode steps of one and 64 sequences and at a prefill chunk, beside torch."""
    # q, k and v read, q written in place, k and v into the cache, and the turns.
    rope_bytes = 2 * (H + 2 * KH) * D * 2 + D * 4
    ops: tuple[tuple[str, int, Callable[..., Any], Callable[..., Any]], ...] = (
        ("add_rms_norm", 4 * E * 2, _bound_norm, _torch_norm),
        ("rope_kv_write", rope_bytes, _bound_rope, _torch_rope),
        ("swiglu", 3 * INNER * 2, _bound_gate, _torch_gate),
    )
    return [
        Timing(
            f"{name} T{num_tokens}",
            partial(bind, device, num_tokens=num_tokens),
            num_tokens * num_bytes,
            rivals={"torch": partial(rival, device, num_tokens)},
        )
        for name, num_bytes, bind, rival in ops
        for num_tokens in (1, 64, 8192)
    ]


def _torch_norm(device: torch.device, num_tokens: int) -> Callable[[], object]:
    x, residual, weight = (_randn(*shape, device=device) for shape in ((num_tokens, E), (num_tokens, E), (E,)))
    return lambda: F.rms_norm(residual + x, (E,), weight, 1e-5)


def _torch_rope(device: torch.device, num_tokens: int) -> Callable[[], object]:
    qkv, kv, _ = _cache(device, num_tokens, torch.bfloat16)
    slots = torch.randperm(kv.shape[1], device=device)[:num_tokens]
    angles = _angles(device, torch.randint(POSITIONS, (num_tokens,), device=device))
    cosine, sine = angles.bfloat16().unbind(-1)

    def rotate() -> None:
        heads = qkv.view(num_tokens, -1, D)
        real, imaginary = heads[:, : H + KH, 0::2], heads[:, : H + KH, 1::2]
        turned = (
            real * cosine[:, None] - imaginary * sine[:, None],
            real * sine[:, None] + imaginary * cosine[:, None],
        )
        heads[:, : H + KH] = torch.stack(turned, dim=-1).flatten(-2)
        kv.index_copy_(1, slots, heads[:, H:].transpose(0, 1))

    return rotate


def _torch_gate(device: torch.device, num_tokens: int) -> Callable[[], object]:
    gate_up = _randn(num_tokens, 2 * INNER, device=device)

    def gate() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    return gate
