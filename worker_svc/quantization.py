"""Weights of linears in few bits: the canonical forms, and how a float weight becomes one.

    int8   w = values * scale            one scale a row, or a row and group of columns; symmetric, -127..127
    int4   w = (values - zero) * scale   values and zeros 0..15, a scale and a zero for each row and group of columns
    fp8    w = values * scale            float8_e4m3fn, one scale a row

Checkpoint formats are translated into these forms, devices pack them as their kernels like. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
INT4_GROUP: Final = 128


@dataclass(frozen=True, slots=True)
class Int8Weight:
    values: torch.Tensor  # [out, in] int8
    scales: torch.Tensor  # [out, groups] float32


@dataclass(frozen=True, slots=True)
class Int4Weight:
    values: torch.Tensor  # [out, in] uint8, 0..15
    scales: torch.Tensor  # [out, groups] float32
    zeros: torch.Tensor  # [out, groups] uint8, 0..15


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    values: torch.Tensor  # [out, in] float8_e4m3fn
    scales: torch.Tensor  # [out] float32


QuantizedWeight = Int8Weight | Int4Weight | Fp8Weight
Weight = torch.Tensor | QuantizedWeight


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """The weight that is meant: [out, in] float32."""
    match weight:
        case Int8Weight(values, scales):
            return values.float() * _widen(scales, values.shape[1])
        case Int4Weight(values, scales, zeros):
            size = values.shape[1]
            return (values.float() - _widen(zeros.float(), size)) * _widen(scales, size)
        case Fp8Weight(values, scales):
            return values.float() * scales[:, None]


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """One scale a row. `weight`: [out, in]."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return Int8Weight((weight / scales).round_().to(torch.int8), scales)


def quantize_int4(weight: torch.Tensor) -> Int4Weight:
    """A scale and a zero for each row and `INT4_GROUP` columns, or all columns if they are no multiple of that."""
    rows, columns = weight.shape
    size = INT4_GROUP if columns % INT4_GROUP == 0 else columns
    groups = weight.float().view(rows, columns // size, size)
    low, high = groups.amin(dim=2).clamp_max(0), groups.amax(dim=2).clamp_min(0)
    scales = ((high - low) / 15).clamp_min(1e-12)
    zeros = (-low / scales).round()
    values = (groups / scales[..., None] + zeros[..., None]).round_().clamp_(0, 15)
    return Int4Weight(values.view(rows, columns).to(torch.uint8), scales, zeros.to(torch.uint8))


def quantize_fp8(weight: torch.Tensor) -> Fp8Weight:
    """One scale a row. `weight`: [out, in]."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / FP8_MAX
    return Fp8Weight((weight / scales[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales)


QUANTIZERS: Final[dict[str, Callable[[torch.Tensor], QuantizedWeight]]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}


def rows_of(weight: Weight, index: torch.Tensor) -> Weight:
    """Some rows, in the order of `index`: [rows] int64."""
    match weight:
        case Int8Weight(values, scales):
            return Int8Weight(values[index], scales[index])
        case Int4Weight(values, scales, zeros):
            return Int4Weight(values[index], scales[index], zeros[index])
        case Fp8Weight(values, scales):
            return Fp8Weight(values.view(torch.uint8)[index].view(FP8), scales[index])
        case _:
            return weight[index]


def side_by_side(weights: Sequence[Weight]) -> Weight:
    """One weight with the rows of all, which are of one kind and, if they have groups, of one group size."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, torch.Tensor)])
    columns = zip(*[_fields(weight) for weight in weights], strict=True)
    return type(first)(*[_cat(column) for column in columns])


def _fields(weight: Weight) -> list[torch.Tensor]:
    return [weight] if isinstance(weight, torch.Tensor) else [getattr(weight, name) for name in weight.__slots__]


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if tensors[0].dtype == FP8:
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(FP8)
    return torch.cat(list(tensors))


def _widen(per_group: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, groups] -> [out, columns]."""
    return per_group.repeat_interleave(columns // per_group.shape[1], dim=1)
