"""Linears: oneDNN's own layout against torch's, padded rows, and int8 by fbgemm against its rivals."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lab.engine.models import SMALL
from lab.engine.race import race, rivals
from lab.report import Figure
from worker_svc.backends.backend import Linear
from worker_svc.backends.torch_layers import Int8Linear, PackedLinear, can_pack, make_linear
from worker_svc.quantization import Int8Weight, quantize_int8

ROWS = (1, 2, 4, 16, 256)
Apply = Callable[[torch.Tensor], torch.Tensor]


def float_linears() -> list[Figure]:
    """All linears of `small` but the last, one after the other as in a step: 302 MB of weights."""
    weights = [torch.randn(shape) for _ in range(SMALL.num_layers) for shape in SMALL.linears]
    chosen = [make_linear(weight) for weight in weights]
    kinds: dict[str, list[Apply]] = {
        "as chosen": list(chosen),
        "F.linear": [_plain(weight) for weight in weights],
    }
    if can_pack(weights[0]):
        kinds["packed, rows as they are"] = [_unpadded(linear) for linear in chosen]
    figures = []
    for num_rows in ROWS:
        times = race(_passes(kinds, weights, num_rows), 5)
        # From as many rows on as are padded to, the two are one.
        if num_rows >= 4:
            times.pop("packed, rows as they are", None)
        figures += rivals(f"float32 linears, {num_rows} rows", times, "as chosen")
    return figures


def int8_linears() -> list[Figure]:
    """The same in int8. Torch's dynamic linear has one scale for all rows, so it is no choice, and has no bar."""
    weights = [torch.randn(shape) for _ in range(SMALL.num_layers) for shape in SMALL.linears]
    quantized = [quantize_int8(weight) for weight in weights]
    chosen = [make_linear(weight) for weight in quantized]
    if not isinstance(chosen[0], Int8Linear):
        return []
    kinds: dict[str, list[Apply]] = {
        "int8 by fbgemm": list(chosen),
        "int8 by oneDNN": [_onednn(weight) for weight in quantized],
        "float32": [make_linear(weight) for weight in weights],
    }
    figures = []
    for num_rows in ROWS:
        times = race(_passes(kinds, weights, num_rows), 5)
        # oneDNN is the faster of the two for many rows; decodes, of which there are more, are why it was not chosen.
        onednn = {name: times[name] for name in ("int8 by fbgemm", "int8 by oneDNN")}
        figures += rivals(f"int8 linears, {num_rows} rows", onednn, "int8 by fbgemm", 1.0 if num_rows == 1 else None)
        others = {name: times[name] for name in ("int8 by fbgemm", "float32")}
        figures += rivals(f"int8 linears, {num_rows} rows", others, "int8 by fbgemm")
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


def _unpadded(linear: Linear) -> Apply:
    assert isinstance(linear, PackedLinear)
    return linear._apply


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
