"""AWQ (Lin et al. 2024) with 4 bits as AutoAWQ writes it, version GEMM.

qweight  [in, out / 8]      eight columns a word, in the order of `NIBBLES`
qzeros   [groups, out / 8]  likewise
scales   [groups, out]
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from weft.errors import SettingsError
from worker_svc.formats.bits import unpack
from worker_svc.formats.format import NOTHING, Form, Stored, choice, group_size, is_named, names
from worker_svc.models.config import ConfigReader
from worker_svc.models.loader import Shape
from worker_svc.quantization import Int4Weight, StoredWeight

# Of the columns 0 to 7 of a word: in which of its nibbles each is.
NIBBLES: Final = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """All linears alike, but for those left out."""

    folder: str
    group_size: int | None
    skipped: tuple[str, ...]

    @property
    def unread(self) -> re.Pattern[str]:
        return NOTHING

    def form(self, name: str) -> Form | None:
        return None if is_named(name, self.skipped) else Form("int4", self.group_size)

    def stored(self, name: str, shape: Shape, held: Collection[str]) -> dict[str, Stored]:
        rows, columns = shape
        size = self.group_size or columns
        if rows % len(NIBBLES) or columns % size:
            raise SettingsError(
                f"{self.folder}: {name} is {[rows, columns]}, which AWQ in groups of {size} cannot hold"
            )
        groups = columns // size
        return {
            "qweight": Stored(((columns, rows // len(NIBBLES)),), ("I32",)),
            "qzeros": Stored(((groups, rows // len(NIBBLES)),), ("I32",)),
            "scales": Stored(((groups, rows),)),
        }

    def decode(self, name: str, shape: Shape, tensors: Mapping[str, torch.Tensor]) -> StoredWeight:
        scales = tensors["scales"].t().float().contiguous()
        return Int4Weight(_unpack(tensors["qweight"]), scales, _unpack(tensors["qzeros"]))


def read(config: ConfigReader, folder: str) -> AwqFormat:
    """Raises SettingsError: asks for what is not known."""
    # AutoAWQ's own config has other names than the one it writes for transformers.
    own = "w_bit" in config.config
    choice(config, "w_bit" if own else "bits", (4,), 4)
    choice(config, "version" if config.config.get("version") else "format", ("gemm", "GEMM"), "gemm")
    if config.config.get("backend") == "llm-awq":
        raise SettingsError(f"{config.source}: backend is 'llm-awq', which packs in another order than AutoAWQ")
    size = group_size(config, "q_group_size" if own else "group_size", 128)
    return AwqFormat(folder, size, names(config, "modules_to_not_convert"))


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """[n, out / 8] int32 -> [out, n] uint8."""
    nibbles = unpack(words, 4).view(*words.shape, len(NIBBLES))
    return nibbles[..., NIBBLES].flatten(1).t().contiguous()
