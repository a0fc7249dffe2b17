"""x W^T + bias + residual with weights and x in int8 and sums in int32, for any number of rows.

As `tiled_linear`: panels of columns, and tiles of rows whose sums stay in vector registers over all channels. An
instruction of AVX-512 VNNI multiplies four unsigned bytes with four signed ones and adds them up, in each of 16
columns. So x is quantized to unsigned bytes, 128 more than is meant, and sums begin with -128 times those of weights.

Every row of x has a scale of its own, largest value / 127, so that none depends on what else is in the step.

Reference: `backends.torch_layers.Int8Linear`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from worker_svc.cpu_kernels.launch import (
    LINE,
    arguments,
    check,
    check_rows,
    empty,
    float_of_bits,
    floats,
    kernel,
    launch,
    num_threads,
    take,
    thread_number,
    threads_for,
)
from worker_svc.cpu_kernels.register_tiles import (
    LANES,
    PANEL,
    generate_for_each,
    load_from,
    spread_over,
    tile_rows,
)
from worker_svc.quantization import Int8Weight

# Whether the CPU has the instruction.
HAS_VNNI: Final = bool(binding.get_host_cpu_features().get("avx512vnni"))
# Channels that one instruction takes, and groups of them that one pass of the inner loop takes.
GROUP: Final = 4
UNROLL: Final = 4
# Types of the code that is generated.
_INT64: Final = ir.IntType(64)
_INTEGERS: Final = ir.VectorType(ir.IntType(32), LANES)
_FLOATS: Final = ir.VectorType(ir.FloatType(), LANES)
# Products that take about a millisecond.
_LONG: Final = 400_000_000
# Panels that a thread takes in one piece.
PANELS_AT_ONCE: Final = 4
# The bits of infinity, above which are those of NaN.
_INFINITY = np.int32(0x7F800000)
# Rows without a larger value are taken for zeros: 127 / largest has to be finite.
_SMALLEST = np.float32(1e-30)
_LIMIT = np.float32(127.0)
# 1.5 * 2^23 + 128: a small number added to it is rounded to an integer, and the last byte is that plus 128.
_ROUNDING = np.float32(12582912.0 + 128.0)


@kernel
def _quantize(pointer):
    args = arguments(pointer)
    num_rows, size, stride, lines = args[0], args[1], args[2], args[3]
    scales = floats(args[6], num_rows)
    for row in range(thread_number(), num_rows, num_threads()):
        x = floats(args[4] + 4 * row * stride, size)
        out = floats(args[5] + LINE * row * lines, LINE // 4 * lines).view(np.uint8)
        bits = x.view(np.int32)
        # As integers, absolute values are in the order of the numbers, NaN above all.
        largest_bits = np.int32(0)
        for i in range(size):
            largest_bits = max(largest_bits, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        largest = float_of_bits(largest_bits)
        factor = np.float32(0.0)
        scales[row] = np.float32(0.0)
        if largest_bits >= _INFINITY:
            scales[row] = np.float32(np.nan)
        elif largest > _SMALLEST:
            factor = _LIMIT / largest
            scales[row] = largest / _LIMIT
        if factor == np.float32(0.0):
            # NaN and infinity are no number of steps.
            for i in range(size):
                out[i] = np.uint8(128)
        else:
            for i in range(size):
                out[i] = np.uint8(np.float32(x[i] * factor + _ROUNDING).view(np.int32) & np.int32(255))


class _Tile(NamedTuple):
    """What a tile is computed from, as values of the code that is generated: addresses, bytes and counts in int64."""

    x: Any
    x_stride: Any
    scales: Any  # of rows
    panel: Any
    num_groups: Any  # of channels, a multiple of UNROLL
    columns: Any  # [3, PANEL]: what sums begin with, scales, biases
    residual: Any
    out: Any
    out_stride: Any  # of the residual, too
    num_columns: Any  # that are there, of the panel
    num_residuals: Any  # as many, or none


@intrinsic
def _compute_tile(
    context: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    scales: Any,
    panel: Any,
    num_groups: Any,
    columns: Any,
    residual: Any,
    out: Any,
    out_stride: Any,
    num_columns: Any,
    num_residuals: Any,
) -> Any:
    """One of TILE_ROWS of rows of the result, in the columns of a panel."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(*args[1:])
        generate_for_each(
            builder, args[0], lambda count: _generate_stores(builder, tile, _generate_sums(builder, tile, count))
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), generate


def _generate_sums(builder: Any, tile: _Tile, num_rows: int) -> list[list[Any]]:
    """For each row two vectors: what they begin with + sum over k of x[k] * panel[k]."""
    kind = ir.FunctionType(_INTEGERS, [_INTEGERS] * 3)
    multiply_add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    rows = [builder.add(tile.x, builder.mul(tile.x_stride, _INT64(row))) for row in range(num_rows)]
    starts = [load_from(builder, place, _INTEGERS, LINE) for place in _halves(builder, tile.columns, 0)]
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("stores")
    builder.branch(loop)
    builder.position_at_end(loop)
    group = builder.phi(_INT64)
    group.add_incoming(_INT64(0), before)
    phis = [[builder.phi(_INTEGERS) for _ in starts] for _ in rows]
    totals: list[list[Any]] = [list(pair) for pair in phis]
    lines = builder.add(tile.panel, builder.mul(group, _INT64(2 * LINE)))
    values = [builder.add(row, builder.mul(group, _INT64(GROUP))) for row in rows]
    for step in range(UNROLL):
        weights = [load_from(builder, place, _INTEGERS, LINE) for place in _halves(builder, lines, step)]
        for pair, address in zip(totals, values, strict=True):
            four = load_from(builder, builder.add(address, _INT64(GROUP * step)), _INTEGERS.element, GROUP)
            spread = spread_over(builder, four, _INTEGERS)
            for half, weight in enumerate(weights):
                pair[half] = builder.call(multiply_add, [pair[half], spread, weight])
    following = builder.add(group, _INT64(UNROLL))
    group.add_incoming(following, loop)
    for pair, ends in zip(phis, totals, strict=True):
        for phi, start, end in zip(pair, starts, ends, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, tile.num_groups), loop, after)
    builder.position_at_end(after)
    return totals


def _generate_stores(builder: Any, tile: _Tile, totals: list[list[Any]]) -> None:
    """out = sums * scale of the row * scales of the columns + bias + residual, where there are columns.

    Generated too, since as Python that numba compiled it took a quarter as long as products of 768 channels (AMD EPYC
    with AVX-512 VNNI, 2026).
    """
    pointer, mask = _FLOATS.as_pointer(), ir.VectorType(ir.IntType(1), LANES)
    kind = ir.FunctionType(_FLOATS, [pointer, ir.IntType(32), mask, _FLOATS])
    masked_load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
    kind = ir.FunctionType(ir.VoidType(), [_FLOATS, pointer, ir.IntType(32), mask])
    masked_store = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0")
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    align, zeros = ir.IntType(32)(4), ir.Constant(_FLOATS, None)
    scales, biases = (
        [load_from(builder, place, _FLOATS, LINE) for place in _halves(builder, tile.columns, i)] for i in (1, 2)
    )
    are_columns, are_residuals = (_masks(builder, count) for count in (tile.num_columns, tile.num_residuals))
    for row, sums in enumerate(totals):
        place = builder.add(tile.scales, _INT64(4 * row))
        scale = spread_over(builder, load_from(builder, place, _FLOATS.element, 4), _FLOATS)
        offset = builder.mul(tile.out_stride, _INT64(row))
        sources, targets = (_halves(builder, builder.add(base, offset), 0) for base in (tile.residual, tile.out))
        for half, total in enumerate(sums):
            factor = builder.fmul(scale, scales[half])
            # Left to choose, the compiler rounds once for one row and twice for two.
            value = builder.call(multiply_add, [builder.sitofp(total, _FLOATS), factor, biases[half]])
            source, target = (builder.inttoptr(places[half], pointer) for places in (sources, targets))
            residual = builder.call(masked_load, [source, align, are_residuals[half], zeros])
            builder.call(masked_store, [builder.fadd(value, residual), target, align, are_columns[half]])


def _halves(builder: Any, address: Any, index: int) -> list[Any]:
    """The two vectors of a panel's columns, in the row of this index."""
    return [builder.add(address, _INT64((2 * index + half) * LINE)) for half in range(2)]


def _masks(builder: Any, count: Any) -> list[Any]:
    """For each half of a panel, which of its columns are among the first `count`."""
    spread = spread_over(builder, builder.trunc(count, _INTEGERS.element), _INTEGERS)
    indices = [ir.Constant(_INTEGERS, list(range(half * LANES, (half + 1) * LANES))) for half in range(2)]
    return [builder.icmp_signed("<", index, spread) for index in indices]


@kernel
def _linear(pointer):
    args = arguments(pointer)
    num_rows, num_columns, num_groups, stride = args[0], args[1], args[2], args[3]
    num_panels = (num_columns + PANEL - 1) // PANEL
    some = take(pointer, PANELS_AT_ONCE)
    while some < num_panels:
        for panel in range(some, min(some + PANELS_AT_ONCE, num_panels)):
            weights = args[6] + panel * num_groups * GROUP * PANEL
            columns = args[7] + 12 * panel * PANEL
            count = min(PANEL, num_columns - panel * PANEL)
            # Where there is no residual, none is read.
            num_residuals = count if args[8] != 0 else 0
            begin = 0
            while begin < num_rows:
                # Some rows may be done again.
                tile = tile_rows(num_rows - begin, num_rows)
                first = min(begin, num_rows - tile)
                begin = first + tile
                x, scales = args[4] + first * stride, args[5] + 4 * first
                offset = 4 * (first * num_columns + panel * PANEL)
                out = args[9] + offset
                residual = args[8] + offset if args[8] != 0 else out
                _compute_tile(
                    tile,
                    x,
                    stride,
                    scales,
                    weights,
                    num_groups,
                    columns,
                    residual,
                    out,
                    4 * num_columns,
                    count,
                    num_residuals,
                )
        some = take(pointer, PANELS_AT_ONCE)


class TiledInt8Linear:
    """A packed weight, on a CPU that HAS_VNNI.

    All linears of a 125M-parameter Llama, one after the other, took 4.2, 5.9 and 70 ms for 1, 16 and 256 rows, and 5.3,
    9.2 and 100 ms in fbgemm (two threads, AMD EPYC with AVX-512 VNNI, 2026).
    """

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        """`weight`: [out, in], one scale a row, in < 2^17, or sums overflow; a packed copy is kept. `bias`: [out].

        Raises:
            ValueError: scales or a bias of another shape.
        """
        self._num_columns, self._size = weight.values.shape
        scales = weight.scales.float().contiguous()
        bias = torch.zeros(self._num_columns) if bias is None else bias.float().contiguous()
        check("scales", scales, (self._num_columns, 1))
        check("bias", bias, (self._num_columns,))
        self._panels = _pack(weight.values)
        starts = -128 * weight.values.sum(1, dtype=torch.int32)
        self._columns = _pack_columns(starts.view(torch.float32), scales[:, 0], bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: [T, in] float32, each row contiguous; returns [T, out]. Raises ValueError for any other."""
        check_rows("x", x, self._size)
        return self._run(x, 0)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual`: [T, out] float32, contiguous; returns the sum. Raises ValueError for any other."""
        check_rows("x", x, self._size)
        check("residual", residual, (len(x), self._num_columns))
        return self._run(x, residual.data_ptr())

    def _run(self, x: torch.Tensor, residual: int) -> torch.Tensor:
        num_rows, num_groups = len(x), self._panels.shape[1]
        quantized, scales = _quantized(x, num_groups)
        out = empty(num_rows, self._num_columns)
        launch(
            _linear,
            torch.get_num_threads(),
            num_rows,
            self._num_columns,
            num_groups,
            quantized.stride(0),
            quantized.data_ptr(),
            scales.data_ptr(),
            self._panels.data_ptr(),
            self._columns.data_ptr(),
            residual,
            out.data_ptr(),
            is_long=num_rows * self._num_columns * self._size > _LONG,
        )
        return out


def _quantized(x: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x as unsigned bytes, and the scale of each row.

    Rows are an odd number of cache lines, so that they stand at different places in the cache. Of channels beyond the
    last, which weights of zero multiply, it does not matter what is in them.
    """
    num_rows, size = x.shape
    num_lines = -(-num_groups * GROUP // LINE) | 1
    out, scales = empty(num_rows, num_lines * LINE, dtype=torch.uint8), empty(num_rows)
    pointers = x.data_ptr(), out.data_ptr(), scales.data_ptr()
    launch(_quantize, threads_for(x.numel()), num_rows, size, x.stride(0), num_lines, *pointers)
    return out, scales


def _pack(values: torch.Tensor) -> torch.Tensor:
    """[panels, in / GROUP, PANEL, GROUP], with zeros for the columns and channels that are not there."""
    num_columns, size = values.shape
    num_panels, num_groups = -(-num_columns // PANEL), -(-size // (GROUP * UNROLL)) * UNROLL
    padded = torch.zeros(num_panels * PANEL, num_groups * GROUP, dtype=torch.int8)
    padded[:num_columns, :size] = values
    return padded.view(num_panels, PANEL, num_groups, GROUP).transpose(1, 2).contiguous()


def _pack_columns(*rows: torch.Tensor) -> torch.Tensor:
    """[panels, rows, PANEL] of rows of float32, one value a column, with zeros for the columns that are not there."""
    num_columns = len(rows[0])
    padded = torch.zeros(len(rows), -(-num_columns // PANEL) * PANEL)
    for target, row in zip(padded, rows, strict=True):
        target[:num_columns] = row
    return padded.view(len(rows), -1, PANEL).transpose(0, 1).contiguous()
