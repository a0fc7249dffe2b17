"""Weights that nobody trained, made on the device: to measure a model by its shape, without its files.

They depend on names and shapes alone, so that workers of one kind and shape agree; activations stay finite.
"""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Final, Self

import torch

from worker_svc.formats.format import Form, Format
from worker_svc.models.decoder import LM_HEAD
from worker_svc.models.loader import Asked, Shape
from worker_svc.quantization import (
    FP8,
    HEAD_KINDS,
    INT4_GROUP,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    StoredWeight,
)

# Of the weights' distribution: as models begin their training.
STD: Final = 0.02


class DummyWeights:
    """A `Source` without files. A context manager, as files are."""

    def __init__(self, format: Format, device: torch.device, dtype: torch.dtype, quantize: str = "none") -> None:
        """`quantize`: a key of `quantization.QUANTIZERS` for what `format` holds in floats, or "none"."""
        self._format = format
        self._device = device
        self._dtype = dtype
        self._quantize = quantize

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def check(self, asked: Asked) -> None:
        """Raises SettingsError if the format cannot hold what is asked for."""
        for name, shape in asked.linears.items():
            self._format.stored(name, shape, ())

    def tensor(self, name: str, shape: Shape) -> torch.Tensor:
        """Norms are ones."""
        tensor = torch.empty(shape, device=self._device, dtype=self._dtype)
        if len(shape) == 1 and not name.endswith("bias"):
            return tensor.fill_(1.0)
        return tensor.normal_(0.0, STD, generator=self._generator(name))

    def weight(self, name: str, shape: Shape) -> StoredWeight:
        form = self._form(name, shape)
        if form is None:
            return self.tensor(f"{name}.weight", shape)
        groups = 1 if form.group_size is None else shape[1] // form.group_size
        return self._quantized(form, shape, groups, self._generator(name))

    def _form(self, name: str, shape: Shape) -> Form | None:
        # Quantizers leave the last linear as it is, whether they say so or not.
        held = None if name == LM_HEAD else self._format.form(name)
        if held is not None:
            return held
        match HEAD_KINDS[self._quantize] if name == LM_HEAD else self._quantize:
            case "int4":
                return Form("int4", INT4_GROUP if shape[1] % INT4_GROUP == 0 else None)
            case "int8" | "fp8" as kind:
                return Form(kind)
            case _:
                return None

    def _quantized(self, form: Form, shape: Shape, groups: int, generator: torch.Generator) -> QuantizedWeight:
        """Every value that means something is as likely as any other."""
        octets = torch.empty(shape, device=self._device, dtype=torch.uint8)
        match form.kind:
            case "int8":
                values = octets.view(torch.int8).random_(-127, 128, generator=generator)
                return Int8Weight(values, self._scales(torch.arange(-127, 128), shape[0], groups))
            case "int4":
                values = octets.random_(1, 16, generator=generator)
                scales = self._scales(torch.arange(-7, 8), shape[0], groups)
                return Int4Weight(values, scales, torch.full_like(scales, 8, dtype=torch.uint8))
            case "fp8":
                # Even ones only: no number has all bits of exponent and mantissa set.
                values = octets.random_(0, 128, generator=generator).mul_(2).view(FP8)
                all_values = (torch.arange(128) * 2).to(torch.uint8).view(FP8)
                return Fp8Weight(values, self._scales(all_values, shape[0], 1)[:, 0])

    def _scales(self, values: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
        """Such that values drawn from these make weights of standard deviation `STD`."""
        scale = STD / values.float().square().mean().sqrt().item()
        return torch.full((rows, groups), scale, device=self._device)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
