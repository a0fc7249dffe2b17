"""Linears: the backend's own tiles against oneDNN's and fbgemm's, in float32 and int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F

from lab.engine.models import SMALL
from lab.engine.race import race, rivals
from lab.report import Figure
from worker_svc.backends.numba_backend import NumbaBackend
from worker_svc.backends.torch_layers import Int8Linear, PackedLinear, can_multiply_int8, can_pack
from worker_svc.cpu_kernels.int8_linear import TiledInt8Linear
from worker_svc.quantization import Int8Weight, quantize_int8

Apply = Callable[[torch.Tensor], torch.Tensor]

ROUNDS: Final = 9
CPU: Final = torch.device("cpu")
BACKEND: Final = NumbaBackend(CPU, torch.float32)
# By rows, how many times as long rivals have to take; oneDNN is as fast for many in float32, but for noise.
FLOAT_BARS: Final = {1: 1.1, 4: 1.1, 16: 1.0, 64: 0.95, 256: 0.95}
INT8_BARS: Final = {1: 1.1, 4: 1.1, 16: 1.1, 64: 1.0, 256: 1.0}


def float_linears() -> list[Figure]:
    """All linears of `small` but the last, one after the other as in a step: 302 MB of weights."""
    weights = _weights()
    kinds: dict[str, list[Apply]] = {
        "tiles": [BACKEND.linear(weight, None) for weight in weights],
        "F.linear": [_plain(weight) for weight in weights],
    }
    if can_pack(weights[0]):
        kinds["oneDNN, packed"] = [PackedLinear(weight, None) for weight in weights]
    return _compare("float32 linears", kinds, weights, FLOAT_BARS)


def int8_linears() -> list[Figure]:
    """The same in int8, on a CPU with the instructions for it."""
    weights = _weights()
    quantized = [quantize_int8(weight) for weight in weights]
    chosen = [BACKEND.linear(weight, None) for weight in quantized]
    if not isinstance(chosen[0], TiledInt8Linear):
        return []
    kinds: dict[str, list[Apply]] = {
        "tiles": list(chosen),
        "oneDNN": [_onednn(weight) for weight in quantized],
        "float32": [BACKEND.linear(weight, None) for weight in weights],
    }
    if can_multiply_int8(CPU):
        kinds["fbgemm"] = [Int8Linear(weight, None) for weight in quantized]
    return _compare("int8 linears", kinds, weights, INT8_BARS)


def _weights() -> list[torch.Tensor]:
    return [torch.randn(shape) for _ in range(SMALL.num_layers) for shape in SMALL.linears]


def _compare(
    what: str, kinds: dict[str, list[Apply]], weights: list[torch.Tensor], bars: Mapping[int, float]
) -> list[Figure]:
    figures = []
    for num_rows, bar in bars.items():
        times = race(_passes(kinds, weights, num_rows), ROUNDS)
        figures += rivals(f"{what}, {num_rows} rows", times, "tiles", bar)
    return figures


def _passes(kinds: dict[str, list[Apply]], weights: list[torch.Tensor], num_rows: int) -> dict[str, Callable[[], None]]:
    inputs = {size: torch.randn(num_rows, size) for size in {weight.shape[1] for weight in weights}}

    def make_pass(linears: list[Apply]) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            for linear, weight in zip(linears, weights, strict=True):
                linear(inputs[weight.shape[1]])

        return run

    return {name: make_pass(linears) for name, linears in kinds.items()}


def _plain(weight: torch.Tensor) -> Apply:
    return lambda x: F.linear(x, weight)


def _onednn(weight: Int8Weight) -> Apply:
    """oneDNN's product of unsigned and signed bytes, a scale for each row of x."""
    packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
    scales, zeros = weight.scales[:, 0].contiguous(), torch.zeros(len(weight.values), dtype=torch.int64)
    middle, limit = torch.tensor(128.5), torch.tensor(127.0)
    multiply = torch.ops.onednn.qlinear_pointwise.default

    def apply(x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        rounded = torch.addcmul(middle, x, limit / largest).to(torch.uint8)
        products: torch.Tensor = multiply(
            rounded, 1 / 127, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return products.mul_(largest)

    return apply
