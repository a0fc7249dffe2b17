"""x W^T + bias + residual in float32, for any number of rows.

The weight is packed once into panels of a few columns (rows of W), channel after channel, so that one reads them from
first byte to last. For each panel, tiles of rows of x are multiplied with it; sums of a tile stay in vector registers
over all channels (Goto and van de Geijn 2008). One row then reads weights as fast as memory gives them, and many rows
compute as fast as the registers do.

Reference: `F.linear`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from worker_svc.cpu_kernels.launch import (
    arguments,
    check,
    check_rows,
    empty,
    floats,
    kernel,
    launch,
    take,
)
from worker_svc.cpu_kernels.register_tiles import MAX_TILE_ROWS, PANEL, UNROLL, multiply_tile, tile_rows

# Panels that a thread takes in one piece.
PANELS_AT_ONCE: Final = 2
# Products that take about a millisecond.
_LONG: Final = 100_000_000


@kernel
def _linear(pointer):
    args = arguments(pointer)
    num_rows, num_columns, size = args[0], args[1], args[2]
    x, weight, stride = args[3], args[4], 4 * args[8]
    out = floats(args[5], (num_rows, num_columns))
    has_bias, has_residual = args[6] != 0, args[7] != 0
    # The columns of a panel that is not whole.
    rest = np.empty((MAX_TILE_ROWS, PANEL), np.float32)
    num_panels = (num_columns + PANEL - 1) // PANEL
    some = take(pointer, PANELS_AT_ONCE)
    while some < num_panels:
        for panel in range(some, min(some + PANELS_AT_ONCE, num_panels)):
            address = weight + 4 * panel * size * PANEL
            first_column = panel * PANEL
            count = min(PANEL, num_columns - first_column)
            begin = 0
            while begin < num_rows:
                # Some rows may be done again.
                tile = tile_rows(num_rows - begin, num_rows)
                first = min(begin, num_rows - tile)
                begin = first + tile
                source = x + first * stride
                sums, sums_stride = args[5] + 4 * (first * num_columns + first_column), 4 * num_columns
                if count < PANEL:
                    sums, sums_stride = np.int64(rest.ctypes.data), 4 * PANEL
                multiply_tile(tile, source, stride, address, 4 * PANEL, size, sums, sums_stride)
                if count < PANEL:
                    for row in range(tile):
                        for i in range(count):
                            out[first + row, first_column + i] = rest[row, i]
                for row in range(first, first + tile):
                    # A view for each, since of loops that begin at 0 the compiler knows that no index is negative.
                    target = floats(args[5] + 4 * (row * num_columns + first_column), count)
                    if has_bias:
                        bias = floats(args[6] + 4 * first_column, count)
                        for i in range(count):
                            target[i] += bias[i]
                    if has_residual:
                        residual = floats(args[7] + 4 * (row * num_columns + first_column), count)
                        for i in range(count):
                            target[i] += residual[i]
        some = take(pointer, PANELS_AT_ONCE)


class TiledLinear:
    """A packed weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight`: [out, in] float32, of which a packed copy is kept; `bias`: [out].

        Raises:
            ValueError: a weight that `can_tile` does not want, or a bias of another shape.
        """
        if not can_tile(weight):
            found = f"{weight.dtype} of shape {list(weight.shape)} on {weight.device}"
            raise ValueError(f"weight: {found}, expected torch.float32 of shape [out, {UNROLL} * any] on cpu")
        self._num_columns, self._size = weight.shape
        if bias is not None and bias.shape != (self._num_columns,):
            raise ValueError(f"bias: shape {list(bias.shape)}, expected [{self._num_columns}]")
        self._panels = _pack(weight)
        self._bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [T, in] float32, each row contiguous; returns [T, out]. Raises ValueError for any other."""
        return self._run(x, 0)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual`: [T, out] float32, contiguous; returns the sum. Raises ValueError for any other."""
        check("residual", residual, (len(x), self._num_columns))
        return self._run(x, residual.data_ptr())

    def _run(self, x: torch.Tensor, residual: int) -> torch.Tensor:
        num_rows, num_columns, size = len(x), self._num_columns, self._size
        check_rows("x", x, size)
        out = empty(num_rows, num_columns)
        launch(
            _linear,
            torch.get_num_threads(),
            num_rows,
            num_columns,
            size,
            x.data_ptr(),
            self._panels.data_ptr(),
            out.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            residual,
            x.stride(0),
            is_long=num_rows * num_columns * size > _LONG,
        )
        return out


def can_tile(weight: torch.Tensor) -> bool:
    """Whether a weight of this shape and type can be packed."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape[1] % UNROLL == 0


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """[panels, in, PANEL], with zeros for the columns that are not there."""
    num_columns, size = weight.shape
    num_panels = -(-num_columns // PANEL)
    packed = torch.zeros(num_panels, size, PANEL)
    whole = num_columns // PANEL
    packed[:whole] = weight[: whole * PANEL].view(whole, PANEL, size).transpose(1, 2)
    if whole < num_panels:
        packed[whole, :, : num_columns - whole * PANEL] = weight[whole * PANEL :].t()
    return packed
