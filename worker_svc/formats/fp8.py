"""Floats of 8 bits (e4m3), as DeepSeek, Qwen, vLLM and transformers write them.

    weight            [out, in]
    weight_scale      one, or one a row; or
    weight_scale_inv  one, or one for each block of rows and columns, [ceil(out / rows), ceil(in / columns)]

Either scale multiplies. No kernel here takes blocks: such a weight becomes floats of the model's type again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from weft.errors import SettingsError
from worker_svc.formats.format import Form, Stored, count_blocks, is_named, names
from worker_svc.models.config import ConfigReader
from worker_svc.models.loader import Shape
from worker_svc.quantization import Fp8Weight, StoredWeight

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """All linears alike, but for those left out."""

    block: Block | None
    skipped: tuple[str, ...]

    @property
    def unread(self) -> re.Pattern[str]:
        # Scales of activations: these stay as they are, or get scales of their own.
        return re.compile(r".*\.(input_scale|activation_scale|[kv]_scale)")

    def form(self, name: str) -> Form | None:
        return None if self.block or is_named(name, self.skipped) else Form("fp8")

    def stored(self, name: str, shape: Shape, held: Collection[str]) -> dict[str, Stored]:
        scale = "weight_scale_inv" if self.block or "weight_scale_inv" in held else "weight_scale"
        return fp8_stored(shape, self.block, scale)

    def decode(self, name: str, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
        scale = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
        return fp8_decode(tensors["weight"], tensors[scale], self.block)


def read(config: ConfigReader, folder: str) -> Fp8Format:
    """Raises SettingsError: asks for what is not known."""
    skipped = names(config, "modules_to_not_convert") + names(config, "ignored_layers")
    return Fp8Format(read_block(config, "weight_block_size"), skipped)


def read_block(config: ConfigReader, key: str) -> Block | None:
    """[rows, columns] of the blocks that share a scale, if there are any."""
    match config.config.get(key):
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case value:
            raise SettingsError(f"{config.source}: {key} is {value!r}, not [rows, columns]")


def fp8_stored(shape: Shape, block: Block | None, scale: str) -> dict[str, Stored]:
    """`scale`: the name of the scales' tensor."""
    rows, columns = shape
    scales: tuple[Shape, ...] = ((), (1,), (rows,), (rows, 1))
    if block is not None:
        scales = ((count_blocks(rows, block[0]), count_blocks(columns, block[1])),)
    return {"weight": Stored((shape,), ("F8_E4M3",)), scale: Stored(scales)}


def fp8_decode(values: torch.Tensor, scales: torch.Tensor, block: Block | None) -> StoredWeight:
    """Scales as `fp8_stored` says."""
    scales = scales.float()
    if block is None:
        return Fp8Weight(values, scales.flatten().expand(len(values)).contiguous())
    for dim, size in enumerate(block):
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
    return values.float().mul_(scales)
