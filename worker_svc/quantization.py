"""Weights of linears in few bits: the canonical forms, and how a float weight becomes one.

    int8   w = values * scale            -128..127; one scale a row, or a row and group of columns
    int4   w = (values - zero) * scale   values and zeros 0..15, a scale and a zero for each row and group of columns
    fp8    w = values * scale            float8_e4m3fn, one scale a row

Checkpoint formats are translated into these forms, devices pack them as their kernels like. All functions are pure.
Groups are of one size and stand side by side; a weight whose groups are scattered over its columns comes `Reordered`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
INT4_GROUP: Final = 128
# Weights that are quantized at a time: what that needs in between is a dozen bytes for each.
CHUNK_ELEMENTS: Final = 2**24


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
QuantizedT = TypeVar("QuantizedT", bound=QuantizedWeight)
Weight = torch.Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True)
class Reordered:
    """A weight whose columns stand in another order than the channels of the input."""

    weight: QuantizedWeight
    order: torch.Tensor  # [in] int64: column j is for channel order[j]


# What a checkpoint may hold.
StoredWeight = Weight | Reordered


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


def in_float(weight: StoredWeight) -> torch.Tensor:
    """The weight that is meant, its columns in the order of the input: [out, in] of any float type."""
    match weight:
        case torch.Tensor():
            return weight
        case Reordered(inner, order):
            return dequantize(inner)[:, order.argsort()]
        case _:
            return dequantize(weight)


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


# What the last linear of a model becomes: four bits there alone cost half as much as everywhere else (perplexity of
# tales-6m +5.2 % instead of +3.7 %).
HEAD_KINDS: Final = {"none": "none", "int8": "int8", "int4": "int8", "fp8": "fp8"}


def quantize(weight: torch.Tensor, kind: str) -> QuantizedWeight:
    """Some rows at a time. `weight`: [out, in]; `kind`: a key of `QUANTIZERS`."""
    return _join([QUANTIZERS[kind](rows) for rows in torch.split(weight, _chunk_rows(weight))])


def as_int8(weight: QuantizedWeight) -> Int8Weight:
    """The weight as int8 with one scale a row, nearly: for devices that are fast in that only.

    It is off by up to 0.4 % of a row's largest weight, a tenth of what int4 is off itself.
    """
    if isinstance(weight, Int8Weight) and weight.scales.shape[1] == 1:
        return weight
    chunks = torch.split(torch.arange(len(weight.values)), _chunk_rows(weight.values))
    return _join([quantize_int8(dequantize(_rows(weight, chunk))) for chunk in chunks])


def rows_of(weight: StoredWeight, index: torch.Tensor) -> StoredWeight:
    """Some rows, in the order of `index`: [rows] int64."""
    match weight:
        case torch.Tensor():
            return weight[index]
        case Reordered(inner, order):
            return Reordered(_rows(inner, index), order)
        case _:
            return _rows(weight, index)


def columns_of(weight: Weight, start: int, stop: int) -> Weight:
    """Columns `start` to `stop`.

    Raises:
        ValueError: they cut a group in two.
    """
    match weight:
        case Int8Weight(values, scales):
            return Int8Weight(values[:, start:stop], scales[:, _groups(weight, start, stop)])
        case Int4Weight(values, scales, zeros):
            groups = _groups(weight, start, stop)
            return Int4Weight(values[:, start:stop], scales[:, groups], zeros[:, groups])
        case Fp8Weight(values, scales):
            return Fp8Weight(values[:, start:stop], scales)
        case _:
            return weight[:, start:stop]


def contiguous(weight: Weight) -> Weight:
    """The same without the memory of what it is a part of."""
    if isinstance(weight, torch.Tensor):
        return weight.contiguous()
    return type(weight)(*[tensor.contiguous() for tensor in _fields(weight)])


def can_join(weights: Sequence[StoredWeight]) -> bool:
    """Whether `side_by_side` can make one weight of them: of one kind, group size and order of columns."""
    first = weights[0]
    return all(_can_join(first, weight) for weight in weights)


def side_by_side(weights: Sequence[StoredWeight]) -> StoredWeight:
    """One weight with the rows of all, which `can_join`."""
    if len(weights) == 1:
        return weights[0]
    match weights[0]:
        case torch.Tensor():
            return torch.cat([weight for weight in weights if isinstance(weight, torch.Tensor)])
        case Reordered(_, order):
            return Reordered(_join([weight.weight for weight in weights if isinstance(weight, Reordered)]), order)
        case _:
            return _join([weight for weight in weights if not isinstance(weight, torch.Tensor | Reordered)])


def _can_join(one: StoredWeight, other: StoredWeight) -> bool:
    match one, other:
        case torch.Tensor(), torch.Tensor():
            return True
        case Reordered(weight, order), Reordered(other_weight, other_order):
            return _can_join(weight, other_weight) and torch.equal(order, other_order)
        case (torch.Tensor() | Reordered(), _) | (_, torch.Tensor() | Reordered()):
            return False
        case _:
            return type(one) is type(other) and one.scales.shape[1:] == other.scales.shape[1:]


def _join(weights: Sequence[QuantizedT]) -> QuantizedT:
    if len(weights) == 1:
        return weights[0]
    columns = zip(*[_fields(weight) for weight in weights], strict=True)
    return type(weights[0])(*[_on_bytes(lambda *parts: torch.cat(parts), *column) for column in columns])


def _rows(weight: QuantizedWeight, index: torch.Tensor) -> QuantizedWeight:
    return type(weight)(*[_on_bytes(lambda tensor: tensor[index], tensor) for tensor in _fields(weight)])


def _fields(weight: QuantizedWeight) -> list[torch.Tensor]:
    return [getattr(weight, name) for name in weight.__slots__]


def _on_bytes(change: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Not every device can index and join floats of 8 bits, but their bytes."""
    if tensors[0].dtype != FP8:
        return change(*tensors)
    return change(*[tensor.view(torch.uint8) for tensor in tensors]).view(FP8)


def _chunk_rows(weight: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[1])


def _groups(weight: Int8Weight | Int4Weight, start: int, stop: int) -> slice:
    columns, count = weight.values.shape[1], weight.scales.shape[1]
    if count == 1:
        return slice(0, 1)
    size = columns // count
    if start % size or stop % size:
        raise ValueError(f"columns {start} to {stop} cut groups of {size} columns")
    return slice(start // size, stop // size)


def _widen(per_group: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, groups] -> [out, columns]."""
    return per_group.repeat_interleave(columns // per_group.shape[1], dim=1)
