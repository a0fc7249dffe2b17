"""compressed-tensors, as LLM Compressor writes it: int8, fp8 and packed integers, a scheme for each group of linears.

    int-quantized    weight [out, in] int8
    float-quantized  weight [out, in] e4m3
    pack-quantized   weight_packed [out, ceil(in * bits / 32)], every field with 2^(bits - 1) added; weight_shape [2];
                     weight_zero_point [ceil(out * bits / 32), groups], packed alike along rows, if asymmetric;
                     weight_g_idx [in], the group of each channel, if formed in the order of activations

Beside each stands weight_scale: one, one a row ([out, 1]) or one a row and group ([out, groups]); of fp8 perhaps one a
block. Schemes of activations are not followed: these stay floats, or get scales of their own, token by token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from weft.errors import SettingsError
from worker_svc.formats.bits import signed, unpack
from worker_svc.formats.format import FLOATS, Form, Stored, choice, compile_pattern, count_blocks, names
from worker_svc.formats.fp8 import Block, fp8_decode, fp8_stored, read_block
from worker_svc.formats.groups import channel_order
from worker_svc.models.config import ConfigReader
from worker_svc.models.loader import Shape
from worker_svc.quantization import Int4Weight, Int8Weight, Reordered, StoredWeight

Tensors = Mapping[str, torch.Tensor]


class Scheme(Protocol):
    """How the linears of one group are held."""

    @property
    def form(self) -> Form | None: ...

    def stored(self, shape: Shape) -> dict[str, Stored]: ...

    def decode(self, label: str, shape: Shape, tensors: Tensors) -> StoredWeight: ...


@dataclass(frozen=True, slots=True)
class Targets:
    """Linears by name, by pattern, or all of them."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    has_all: bool

    def has(self, name: str) -> bool:
        """Whether the linear is called for by name or pattern."""
        return name in self.names or any(pattern.match(name) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Group:
    """Which linears a scheme is for."""

    targets: Targets
    scheme: Scheme | None  # None for floats


@dataclass(frozen=True, slots=True)
class CompressedFormat:
    """Schemes by groups of linears."""

    folder: str
    groups: tuple[Group, ...]
    ignored: Targets

    @property
    def unread(self) -> re.Pattern[str]:
        scales = r"(input|output)_(scale|zero_point|global_scale)|[kvq]_(scale|zero_point)"
        return re.compile(rf".*\.({scales})")

    def form(self, name: str) -> Form | None:
        scheme = self._scheme(name)
        return scheme.form if scheme else None

    def stored(self, name: str, shape: Shape, held: Collection[str]) -> dict[str, Stored]:
        scheme = self._scheme(name)
        if scheme is None:
            return FLOATS.stored(name, shape, held)
        try:
            return scheme.stored(shape)
        except ValueError as error:
            raise SettingsError(f"{self.folder}: {name}: {error}") from error

    def decode(self, name: str, shape: Shape, tensors: Tensors) -> StoredWeight:
        scheme = self._scheme(name)
        if scheme is None:
            return FLOATS.decode(name, shape, tensors)
        return scheme.decode(f"{self.folder}: {name}", shape, tensors)

    def _scheme(self, name: str) -> Scheme | None:
        if self.ignored.has_all or self.ignored.has(name):
            return None
        # A name or pattern counts more than the class, whichever comes first.
        by_name = [group for group in self.groups if group.targets.has(name)]
        by_class = [group for group in self.groups if group.targets.has_all]
        return next((group.scheme for group in by_name + by_class), None)


@dataclass(frozen=True, slots=True)
class PlainIntegers:
    """int-quantized."""

    group_size: int | None

    @property
    def form(self) -> Form | None:
        return Form("int8", self.group_size)

    def stored(self, shape: Shape) -> dict[str, Stored]:
        scales = _scale_shapes(shape, self.group_size)
        return {
            "weight": Stored((shape,), ("I8",)),
            "weight_scale": Stored(scales),
            "weight_zero_point": Stored(scales, ("I8",), is_optional=True),
        }

    def decode(self, label: str, shape: Shape, tensors: Tensors) -> StoredWeight:
        if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
            raise SettingsError(f"{label}.weight_zero_point is not zero in a symmetric scheme")
        return Int8Weight(tensors["weight"], _scales(tensors["weight_scale"], shape))


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """pack-quantized."""

    bits: int
    group_size: int | None
    is_symmetric: bool
    has_order: bool

    @property
    def form(self) -> Form | None:
        return Form("int4" if self.bits == 4 else "int8", self.group_size)

    def stored(self, shape: Shape) -> dict[str, Stored]:
        rows, columns = shape
        per_word = 32 // self.bits
        scales = _scale_shapes(shape, self.group_size)
        stored = {
            "weight_packed": Stored(((rows, count_blocks(columns, per_word)),), ("I32",)),
            "weight_shape": Stored(((2,),), ("I32", "I64")),
            "weight_scale": Stored(scales),
        }
        if not self.is_symmetric:
            shapes = tuple((count_blocks(rows, per_word), groups) for _, groups in scales[-1:])
            stored["weight_zero_point"] = Stored(shapes, ("I32",))
        if self.has_order:
            stored["weight_g_idx"] = Stored(((columns,),), ("I32", "I64"))
        return stored

    def decode(self, label: str, shape: Shape, tensors: Tensors) -> StoredWeight:
        if tuple(tensors["weight_shape"].tolist()) != shape:
            raise SettingsError(f"{label}.weight_shape is {tensors['weight_shape'].tolist()} instead of {list(shape)}")
        rows, columns = shape
        values = unpack(tensors["weight_packed"], self.bits)[:, :columns]
        scales = _scales(tensors["weight_scale"], shape)
        order = self._order(label, tensors, scales.shape[1])
        if order is not None:
            values = values[:, order]
        if self.bits == 8:
            weight: Int4Weight | Int8Weight = Int8Weight(signed(values), scales)
        elif self.is_symmetric:
            weight = Int4Weight(values, scales, torch.full_like(scales, 8, dtype=torch.uint8))
        else:
            weight = Int4Weight(values, scales, unpack(tensors["weight_zero_point"].t(), 4).t()[:rows].contiguous())
        return weight if order is None else Reordered(weight, order)

    def _order(self, label: str, tensors: Tensors, num_groups: int) -> torch.Tensor | None:
        groups = tensors.get("weight_g_idx")
        # -1 stands where no order was ever set.
        if groups is None or (groups < 0).any():
            return None
        return channel_order(groups, num_groups, f"{label}.weight_g_idx")


@dataclass(frozen=True, slots=True)
class Floats:
    """float-quantized."""

    block: Block | None

    @property
    def form(self) -> Form | None:
        return None if self.block else Form("fp8")

    def stored(self, shape: Shape) -> dict[str, Stored]:
        return fp8_stored(shape, self.block, "weight_scale")

    def decode(self, label: str, shape: Shape, tensors: Tensors) -> StoredWeight:
        return fp8_decode(tensors["weight"], tensors["weight_scale"], self.block)


def read(config: ConfigReader, folder: str) -> CompressedFormat:
    """Raises SettingsError: asks for what is not known."""
    choice(config, "quantization_status", ("compressed",), "compressed")
    choice(config.section("sparsity_config"), "format", ("dense",), "dense")
    if config.section("transform_config").config.get("config_groups"):
        raise SettingsError(f"{config.source}: transform_config is set, and transforms of weights are not known")
    section = config.section("config_groups")
    groups = [_read_group(section.section(key), config.config.get("format")) for key in section.config]
    return CompressedFormat(folder, tuple(groups), _read_targets(config, "ignore"))


def _read_group(config: ConfigReader, default_format: object) -> Group:
    targets = _read_targets(config, "targets")
    if config.config.get("weights") is None:
        return Group(targets, None)
    return Group(targets, _read_scheme(config.section("weights"), config.config.get("format") or default_format))


def _read_scheme(weights: ConfigReader, held_as: object) -> Scheme:
    size = weights.integer("group_size", -1, ge=-1)
    default = "group" if size > 0 else "tensor" if weights.config.get("group_size") is None else "channel"
    by = choice(weights, "strategy", ("tensor", "channel", "group", "block"), default)
    group_size = size if by == "group" and size > 0 else None
    bits, kind = weights.integer("num_bits", 8), choice(weights, "type", ("int", "float"), "int")
    is_symmetric = weights.flag("symmetric", True)
    match held_as, kind, bits:
        case "float-quantized" | "naive-quantized", "float", 8 if by != "group" and is_symmetric:
            return Floats(read_block(weights, "block_structure") if by == "block" else None)
        case "int-quantized" | "naive-quantized", "int", 4 | 8 if by != "block" and is_symmetric:
            return PlainIntegers(group_size)
        case "pack-quantized", "int", 4 | 8 if by != "block" and (is_symmetric or (bits == 4 and by != "tensor")):
            # Ordered by "weight" (or "static"), groups stay where they are.
            has_order = weights.config.get("actorder") in ("group", "dynamic", True)
            return PackedIntegers(bits, group_size, is_symmetric, has_order)
    symmetry = "symmetric" if is_symmetric else "asymmetric"
    raise SettingsError(
        f"{weights.source}: {kind} of {bits} bits, {symmetry}, by {by} as {held_as!r} is not known; known are int of 8 "
        f"bits as int-quantized, float of 8 bits as float-quantized, int of 4 or 8 bits as pack-quantized"
    )


def _read_targets(config: ConfigReader, key: str) -> Targets:
    found = names(config, key)
    patterns = [compile_pattern(config, key, name.removeprefix("re:")) for name in found if name.startswith("re:")]
    return Targets(frozenset(found) - {"Linear"}, tuple(patterns), "Linear" in found)


def _scale_shapes(shape: Shape, group_size: int | None) -> tuple[Shape, ...]:
    rows, columns = shape
    if group_size is None:
        return (), (1,), (rows, 1)
    if columns % group_size:
        raise ValueError(f"{columns} columns are no multiple of its groups' {group_size}")
    return ((rows, columns // group_size),)


def _scales(scales: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[out, groups], of any of `_scale_shapes`."""
    scales = scales.float() if scales.ndim == 2 else scales.float().reshape(1, 1)
    return scales.expand(shape[0], -1).contiguous()
