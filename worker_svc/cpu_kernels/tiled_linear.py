"""x W^T + bias + residual in float32, for any number of rows.

The weight is packed once into panels of a few columns (rows of W), channel after channel, so that one reads them from
first byte to last. For each panel, tiles of rows of x are multiplied with it; sums of a tile stay in vector registers
over all channels (Goto and van de Geijn 2008). One row then reads weights as fast as memory gives them, and many rows
compute as fast as the registers do.

Reference: `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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

# Values of a vector register, and rows whose sums, two vectors each, fill the registers there are.
LANES, MAX_TILE_ROWS = (16, 12) if binding.get_host_cpu_features().get("avx512f") else (8, 6)
PANEL: Final = 2 * LANES
# Rows of a tile that there is code for.
TILE_ROWS: Final = tuple(rows for rows in (1, 2, 3, 4, 6, 8, 12) if rows <= MAX_TILE_ROWS)
# Channels that one pass of the inner loop takes.
UNROLL: Final = 4
# Panels that a thread takes in one piece.
PANELS_AT_ONCE: Final = 2
# Products that take about a millisecond.
_LONG: Final = 100_000_000


@intrinsic
def multiply_tile(
    context: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    panel: Any,
    panel_stride: Any,
    size: Any,
    sums: Any,
    sums_stride: Any,
) -> Any:
    """sums[r, c] = sum over k of x[r, k] * panel[k, c], for one of TILE_ROWS of rows, and c < PANEL.

    Addresses, and bytes from one row of each to the next; `size`: channels, a multiple of UNROLL.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        generate_for_each(builder, args[0], lambda count: _generate_tile(builder, count, *args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def generate_for_each(builder: Any, num_rows: Any, generate: Callable[[int], None]) -> None:
    """Code of its own for each of TILE_ROWS, of which that for `num_rows` runs."""
    after = builder.append_basic_block("end")
    choice = builder.switch(num_rows, after)
    for count in TILE_ROWS:
        block = builder.append_basic_block(f"rows_{count}")
        choice.add_case(ir.IntType(64)(count), block)
        builder.position_at_end(block)
        generate(count)
        builder.branch(after)
    builder.position_at_end(after)


@numba.njit(inline="always")
def tile_rows(num_left, num_rows):
    """The fewest of TILE_ROWS that hold all rows that are left, or as many as there are at all."""
    tile = 1
    for rows in TILE_ROWS:
        if tile < num_left and rows <= num_rows:
            tile = rows
    return tile


def _generate_tile(
    builder: Any,
    num_rows: int,
    x: Any,
    x_stride: Any,
    panel: Any,
    panel_stride: Any,
    size: Any,
    sums: Any,
    sums_stride: Any,
) -> None:
    int64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
    kind = ir.FunctionType(vector, [vector] * 3)
    multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    rows = [builder.add(x, builder.mul(x_stride, int64(row))) for row in range(num_rows)]
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(int64)
    k.add_incoming(int64(0), before)
    phis = [[builder.phi(vector) for _ in range(2)] for _ in rows]
    totals: list[list[Any]] = [list(pair) for pair in phis]
    for offset in range(UNROLL):
        channel = builder.add(k, int64(offset))
        line = builder.add(panel, builder.mul(channel, panel_stride))
        halves = [builder.add(line, int64(4 * LANES * half)) for half in range(2)]
        weights = [load_from(builder, half, vector, 4) for half in halves]
        for row, address in enumerate(rows):
            value = load_from(builder, builder.add(address, builder.mul(channel, int64(4))), ir.FloatType(), 4)
            spread = spread_over(builder, value, vector)
            for half in range(2):
                totals[row][half] = builder.call(multiply_add, [spread, weights[half], totals[row][half]])
    following = builder.add(k, int64(UNROLL))
    k.add_incoming(following, loop)
    for pair, ends in zip(phis, totals, strict=True):
        for phi, end in zip(pair, ends, strict=True):
            phi.add_incoming(ir.Constant(vector, None), before)
            phi.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
    builder.position_at_end(after)
    for row, ends in enumerate(totals):
        for half, end in enumerate(ends):
            target = builder.add(builder.add(sums, builder.mul(sums_stride, int64(row))), int64(4 * half * LANES))
            builder.store(end, builder.inttoptr(target, vector.as_pointer())).align = 4


def load_from(builder: Any, address: Any, kind: Any, align: int) -> Any:
    """What is at an address, a multiple of `align`."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def spread_over(builder: Any, value: Any, vector: Any) -> Any:
    """A vector of one value."""
    int32 = ir.IntType(32)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, int32(0))
    zeros = ir.Constant(ir.VectorType(int32, vector.count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


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
