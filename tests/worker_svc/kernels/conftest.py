"""What kernel tests share: casts and products that round as a device rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def device_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to nearest, ties to even, what the interpreter of Triton 3.9 cuts off (bfloat16) or gets wrong (float8)."""
    convert, narrow = interpreter._convert_float, {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

    def convert_rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target not in narrow:
            return convert(values, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(values))
        # As a device does, and torch does not: beyond the largest of this type is the largest.
        clamped = wide.clamp(-448.0, 448.0) if target == tl.float8e4nv else wide
        bits = torch.uint16 if target == tl.bfloat16 else torch.uint8
        return clamped.to(narrow[target]).view(bits).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounded)


@pytest.fixture
def device_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply bfloat16 by its values: the interpreter of Triton 3.9 takes products of its bits."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_widened(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        return create_dot(self, a, b, *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_widened)
