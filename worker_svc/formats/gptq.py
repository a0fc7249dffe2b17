"""GPTQ (Frantar et al. 2023) as AutoGPTQ and GPTQModel write it.

    qweight  [in * bits / 32, out]      the first of a word's rows in its lowest bits
    qzeros   [groups, out * bits / 32]  the same along columns; checkpoint_format "gptq" holds each zero less one
    scales   [groups, out]
    g_idx    [in]                       the group of each input channel

With `desc_act`, groups were formed in the order of falling activations, and lie scattered over the channels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from weft.errors import SettingsError
from worker_svc.formats.bits import signed, unpack
from worker_svc.formats.format import NOTHING, Form, Stored, choice, compile_pattern, group_size
from worker_svc.formats.groups import channel_order
from worker_svc.models.config import ConfigReader
from worker_svc.models.loader import Shape
from worker_svc.quantization import Int4Weight, Int8Weight, QuantizedWeight, Reordered, StoredWeight

SYMMETRIC_ZERO: Final = 128


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """All linears alike, but for those that `dynamic` leaves out."""

    folder: str
    bits: int
    group_size: int | None
    zero_offset: int
    has_order: bool
    skipped: tuple[re.Pattern[str], ...]

    @property
    def unread(self) -> re.Pattern[str]:
        return NOTHING

    def form(self, name: str) -> Form | None:
        if any(skipped.match(name) for skipped in self.skipped):
            return None
        return Form("int4" if self.bits == 4 else "int8", self.group_size)

    def stored(self, name: str, shape: Shape, held: Collection[str]) -> dict[str, Stored]:
        rows, columns = shape
        per_word = 32 // self.bits
        size = self.group_size or columns
        if rows % per_word or columns % per_word or columns % size:
            raise SettingsError(
                f"{self.folder}: {name} is {[rows, columns]}, which GPTQ with {self.bits} bits in groups of {size} "
                f"cannot hold"
            )
        groups = columns // size
        return {
            "qweight": Stored(((columns // per_word, rows),), ("I32",)),
            "qzeros": Stored(((groups, rows // per_word),), ("I32",)),
            "scales": Stored(((groups, rows),)),
            "g_idx": Stored(((columns,),), ("I32", "I64"), is_optional=not self.has_order),
        }

    def decode(self, name: str, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
        values = unpack(tensors["qweight"].t(), self.bits)
        # Zeros that were 0 wrapped around when one was taken off.
        zeros = (unpack(tensors["qzeros"], self.bits) + self.zero_offset & 2**self.bits - 1).t().contiguous()
        scales = tensors["scales"].t().float().contiguous()
        order = None
        if "g_idx" in tensors:
            order = channel_order(tensors["g_idx"], scales.shape[1], f"{self.folder}: {name}.g_idx")
        if order is None:
            return self._weight(name, values, scales, zeros)
        return Reordered(self._weight(name, values[:, order], scales, zeros), order)

    def _weight(self, name: str, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> QuantizedWeight:
        if self.bits == 4:
            return Int4Weight(values, scales, zeros)
        if not (zeros == SYMMETRIC_ZERO).all():
            raise SettingsError(f"{self.folder}: {name}.qzeros: 8 bits with zeros other than 128 cannot be served")
        return Int8Weight(signed(values), scales)


def read(config: ConfigReader, folder: str) -> GptqFormat:
    """Raises SettingsError: asks for what is not known."""
    key = "checkpoint_format" if config.config.get("checkpoint_format") else "format"
    version = choice(config, key, ("gptq", "gptq_v2"), "gptq")
    choice(config, "pack_dtype", ("int32",), "int32")
    choice(config, "is_marlin_format", (False,), False)
    return GptqFormat(
        folder=folder,
        bits=choice(config, "bits", (4, 8)),
        group_size=group_size(config, "group_size", -1),
        zero_offset=1 if version == "gptq" else 0,
        has_order=config.flag("desc_act"),
        skipped=_skipped(config),
    )


def _skipped(config: ConfigReader) -> tuple[re.Pattern[str], ...]:
    """The linears that GPTQModel's `dynamic` leaves in floats ("-:pattern"); it could also change their bits."""
    patterns = []
    for rule in config.section("dynamic").config:
        if not rule.startswith("-:"):
            raise SettingsError(f"{config.source}: dynamic has {rule!r}; known are rules that leave linears out (-:)")
        patterns.append(compile_pattern(config, "dynamic", rule.removeprefix("-:")))
    return tuple(patterns)
