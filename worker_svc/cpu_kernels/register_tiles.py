"""Small matrix products whose sums stay in vector registers: what kernels of many rows are made of.

A tile is a few rows by PANEL columns. Sums of a tile, two vectors for each row, fill the registers there are, and for
each channel two vectors of the panel are multiplied with one number of each row (Goto and van de Geijn 2008). Numba
would not keep sums in registers, so this is code that we generate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Values of a vector register, and rows whose sums, two vectors each, fill the registers there are.
LANES, MAX_TILE_ROWS = (16, 12) if binding.get_host_cpu_features().get("avx512f") else (8, 6)
PANEL: Final = 2 * LANES
# Rows of a tile that there is code for.
TILE_ROWS: Final = tuple(rows for rows in (1, 2, 3, 4, 6, 8, 12) if rows <= MAX_TILE_ROWS)
# Channels that one pass of the inner loop takes.
UNROLL: Final = 4


def _tile(is_added: bool) -> Any:
    @intrinsic
    def tile(
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
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            generate_for_each(builder, args[0], lambda count: _generate_tile(builder, count, is_added, *args[1:]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


# sums[r, c] = sum over k of x[r, k] * panel[k, c], for one of TILE_ROWS of rows, and c < PANEL; or added to what `sums`
# is. Addresses, and bytes from one row of each to the next; `size`: channels, a multiple of UNROLL.
multiply_tile, add_tile = _tile(is_added=False), _tile(is_added=True)


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
    is_added: bool,
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
    lines = [builder.add(sums, builder.mul(sums_stride, int64(row))) for row in range(num_rows)]
    targets = [[line, builder.add(line, int64(4 * LANES))] for line in lines]
    zero = ir.Constant(vector, None)
    starts = [[load_from(builder, target, vector, 4) if is_added else zero for target in pair] for pair in targets]
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
    for pair, begins, ends in zip(phis, starts, totals, strict=True):
        for phi, start, end in zip(pair, begins, ends, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
    builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
    builder.position_at_end(after)
    for pair, ends in zip(targets, totals, strict=True):
        for target, end in zip(pair, ends, strict=True):
            _store_at(builder, target, end)


def load_from(builder: Any, address: Any, kind: Any, align: int) -> Any:
    """What is at an address, a multiple of `align`."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def _store_at(builder: Any, address: Any, value: Any) -> None:
    """`address`: a multiple of 4."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def spread_over(builder: Any, value: Any, vector: Any) -> Any:
    """A vector of one value."""
    int32 = ir.IntType(32)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, int32(0))
    zeros = ir.Constant(ir.VectorType(int32, vector.count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def transpose_square(context: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """target[j, i] = source[i, j] for i, j < LANES. Addresses, and bytes from one row of each to the next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
        at, stride, to, to_stride = args
        rows = [load_from(builder, builder.add(at, builder.mul(stride, int64(i))), vector, 4) for i in range(LANES)]
        distance = LANES // 2
        while distance:
            # Squares of this size change places over the diagonal.
            low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
            high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & distance):
                pair = rows[i], rows[i + distance]
                rows[i], rows[i + distance] = shuffled(builder, *pair, low), shuffled(builder, *pair, high)
            distance //= 2
        for i, row in enumerate(rows):
            _store_at(builder, builder.add(to, builder.mul(to_stride, int64(i))), row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def shuffled(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    """Lanes of two vectors, those of the second counted from LANES on."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))
