"""Weights of 4 or 8 bits in the order in which the threads of a program want them.

A tile is 64 rows by K columns, K = 64 for int4 and 32 for int8, and 512 words of 32 bits: four for each of 128 threads,
16 bytes that it loads at once. Thread 32 w + 4 r + c has what Hopper's matrix unit (wgmma, first operand in registers)
wants of it, so that nothing is moved between threads:

    rows     16 w + r + 8 i,              i = 0, 1
    columns  16 j + 8 h + 2 c + e,        h, e = 0, 1

    int4     word j             nibble i + 2 h + 4 e
    int8     word 2 j + h       byte i + 2 e

So the two weights that stand side by side in a register of the matrix unit, e = 0 and 1, are 16 bits apart in a word,
and one `(word >> shift) & mask | magic` turns both into 16-bit floats: in bfloat16 0x4300 | n is 128 + n for n < 128,
in float16 0x6400 | n is 1024 + n. What is subtracted then has the same offset, 128 + zero for int4; for int8, in two's
complement, 128 + 128 * sign. Both differences are exact. (The trick is of Kim et al. 2022, "Who Says Elephants Can't
Run", for float16.)

Rows are padded to 64 and columns to 128 with weights of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from worker_svc.kernels.matmul_tile import FEW_TOKENS, make_counters
from worker_svc.quantization import Int4Weight, Int8Weight

ROWS: Final = 64
COLUMNS: Final = 128  # two tiles of int4 or four of int8, the longest step of a kernel
TILE_WORDS: Final = tl.constexpr(512)
# An argument of the kernels, not a constant: `a & mask | magic` is one instruction with one constant, two with two.
MAGIC: Final = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400, torch.float32: 0x43004300}
GROUP_SIZES: Final = (32, 64)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """[out, in] of `bits` bits, on the device."""

    bits: int
    out_features: int
    in_features: int
    group_size: int  # columns that share a scale
    words: torch.Tensor  # [ceil(out / 64), tiles of columns, 128, 4] int32
    scales: torch.Tensor  # [groups, out rounded up to 64] int32: float32 bits; of int4 the last 4 are the zero
    counters: torch.Tensor

    @property
    def num_groups(self) -> int:
        return self.scales.shape[0]

    def scaling(self, num_tokens: int) -> str:
        """Where `packed_product` applies scales, for a tile of so many tokens."""
        if self.num_groups == 1:
            return "rows"
        return "sums" if num_tokens <= FEW_TOKENS else "weights"

    def arguments(self) -> dict[str, Any]:
        """Of a kernel."""
        return {
            "words_ptr": self.words,
            "scales_ptr": self.scales,
            "scales_stride": self.scales.stride(0),
            "column_tiles": self.words.shape[1],
            "counters_ptr": self.counters,
            "OUT": self.out_features,
            "K": self.in_features,
            "BITS": self.bits,
            "GROUP_SIZE": self.group_size,
        }


def pack_weight(weight: Int4Weight | Int8Weight) -> PackedWeight:
    """Pack a weight where it is; a scale of int4 is rounded to 20 bits, so one that was 16-bit float stays as it was.

    Raises:
        ValueError: no kernel has groups of this size.
    """
    out_features, in_features = weight.values.shape
    num_groups = weight.scales.shape[1]
    group_size = in_features // num_groups
    if num_groups > 1 and group_size not in GROUP_SIZES and group_size % COLUMNS:
        raise ValueError(f"groups have {group_size} columns, expected 32, 64, a multiple of 128, or all in one group")
    is_int4 = isinstance(weight, Int4Weight)
    scales = weight.scales.float().view(torch.int32)
    if isinstance(weight, Int4Weight):
        scales = (scales + 8 & ~15) | weight.zeros.to(torch.int32)
        words = _pack_int4(_pad(weight.values.to(torch.int32)))
    else:
        words = _pack_int8(_pad(weight.values.to(torch.int32)))
    padding = -out_features % ROWS
    return PackedWeight(
        bits=4 if is_int4 else 8,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        words=words,
        scales=torch.nn.functional.pad(scales.t(), (0, padding)).contiguous(),
        counters=make_counters(out_features, words.device),
    )


def _pad(values: torch.Tensor) -> torch.Tensor:
    out_features, in_features = values.shape
    return torch.nn.functional.pad(values, (0, -in_features % COLUMNS, 0, -out_features % ROWS))


def _pack_int4(values: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    parts = values.view(rows // 64, 4, 2, 8, columns // 64, 4, 2, 4, 2)  # tile w i r, tile j h c e
    shifts = _shifts((2, 2, 2), 4, values.device)
    # tile, tile, w, r, c, j, e, h, i
    return _combine(parts.permute(0, 4, 1, 3, 7, 5, 8, 6, 2), shifts, 15)


def _pack_int8(values: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    parts = values.view(rows // 64, 4, 2, 8, columns // 32, 2, 2, 4, 2)  # tile w i r, tile j h c e
    shifts = _shifts((2, 2), 8, values.device)
    # tile, tile, w, r, c, j, h, e, i
    return _combine(parts.permute(0, 4, 1, 3, 7, 5, 6, 8, 2).flatten(5, 6), shifts, 255)


def _shifts(shape: tuple[int, ...], bits: int, device: torch.device) -> torch.Tensor:
    size = 32 // bits
    return (torch.arange(size, dtype=torch.int32, device=device) * bits).view(shape)


def _combine(parts: torch.Tensor, shifts: torch.Tensor, mask: int) -> torch.Tensor:
    """One word of the last dimensions. Fields do not overlap, so their sum, modulo 2^32, is their union."""
    fields = (parts & mask) << shifts
    words = fields.flatten(-shifts.ndim).sum(-1, dtype=torch.int32)
    return words.reshape(*words.shape[:2], 128, 4)


@triton.jit
def word_ptrs(
    words_ptr, row_tile, last_row_tile, column_tiles, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Where the words of the first columns are: [2 * ROWS, W], threads by words.

    Args:
        row_tile: the first of ROWS / 64; those after the last are as the last.
        COLUMNS: 32 or 64.
    """
    thread = tl.arange(0, 2 * ROWS)
    row_tiles = tl.minimum(row_tile + thread // 128, last_row_tile).to(tl.int64) * (column_tiles * TILE_WORDS)
    word = tl.arange(0, min(COLUMNS * BITS // 64, 4))
    return words_ptr + (row_tiles + thread % 128 * 4)[:, None] + word[None, :]


@triton.jit
def scale_ptrs(scales_ptr, row_tile, last_row_tile, ROWS: tl.constexpr):
    """Where the first group's scales are: of the rows [ROWS], and of the threads' rows with i = 0 [2 * ROWS]."""
    row, thread = tl.arange(0, ROWS), tl.arange(0, 2 * ROWS)
    rows = tl.minimum(row_tile + row // 64, last_row_tile) * 64 + row % 64
    low_rows = tl.minimum(row_tile + thread // 128, last_row_tile) * 64 + thread % 128 // 32 * 16 + thread // 4 % 8
    return scales_ptr + rows, scales_ptr + low_rows


@triton.jit
def load_words(ptrs, k, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of 32 or 64 columns from column `k` on, which is a multiple of that.

    Args:
        ptrs: of `word_ptrs`.

    Returns:
        [2 * ROWS, W] int32, for 64 columns of int8 [2 * ROWS, 4, 2].
    """
    place = k * BITS // 256 * TILE_WORDS
    if BITS == 4 and COLUMNS == 32:
        place += k // 32 % 2 * 2
    words = tl.load(ptrs + place)
    if BITS == 8 and COLUMNS == 64:
        words = tl.join(words, tl.load(ptrs + place + TILE_WORDS))
    return words


@triton.jit
def unpack_words(words, zeros_low, zeros_high, magic, BITS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Words to weights.

    Args:
        words: of `load_words`.
        zeros_low: [2 * ROWS, 1] of 16-bit float, 128 + zero of the threads' rows with i = 0; of int4 only.
        zeros_high: those with i = 1.

    Returns:
        [ROWS, COLUMNS] of `dtype`.
    """
    narrow: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.bfloat16
    TILES: tl.constexpr = words.shape[0] // 32  # of 16 rows
    STEPS: tl.constexpr = COLUMNS // 16
    if BITS == 4:
        low = tl.join(_pair_int4(words, zeros_low, magic, narrow), _pair_int4(words >> 4, zeros_high, magic, narrow))
        high = tl.join(
            _pair_int4(words >> 8, zeros_low, magic, narrow), _pair_int4(words >> 12, zeros_high, magic, narrow)
        )
        parts = tl.reshape(tl.join(low, high), (TILES, 8, 4, STEPS, 2, 2, 2))  # w r c, j, e i h
        parts = tl.permute(parts, (0, 5, 1, 3, 6, 2, 4))
    else:
        pairs = tl.join(_pair_int8(words, magic, narrow), _pair_int8(words >> 8, magic, narrow))
        # The second half of the columns is a dimension of its own, or one of size 1.
        parts = tl.reshape(pairs, (TILES, 8, 4, 2, 2, STEPS // 2, 2, 2))  # w r c, j h, half, e i
        parts = tl.permute(parts, (0, 7, 1, 5, 3, 4, 2, 6))
    return tl.reshape(parts, (TILES * 16, COLUMNS)).to(dtype)  # w i r, j h c e


@triton.jit
def _pair_int4(words, zeros, magic, dtype: tl.constexpr):
    """Both weights of the low nibbles of a word's halves, along a new last dimension."""
    low, high = _halves((words & 0x000F000F) | magic, dtype)
    # This order of statements keeps the pair in one register: 11 instead of 64 permutations (PRMT) a loop on sm_90.
    high = _minus(high, zeros)
    low = _minus(low, zeros)
    return tl.join(low, high)


@triton.jit
def _pair_int8(words, magic, dtype: tl.constexpr):
    low, high = _halves((words & 0x007F007F) | magic, dtype)
    low_sign, high_sign = _halves((words & 0x00800080) | magic, dtype)
    high = _minus(high, high_sign)
    low = _minus(low, low_sign)
    return tl.join(low, high)


@triton.jit
def _minus(a, b):
    """In float32 for the interpreter, which has nothing narrower; the compiler makes a 16-bit difference of it."""
    return (a.to(tl.float32) - b.to(tl.float32)).to(a.dtype)


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The two 16-bit floats that a word is, the low one first."""
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    low = words.to(tl.int16).to(dtype, bitcast=True)
    return low, high


@triton.jit
def offset_zeros(scales, magic, dtype: tl.constexpr):
    """128 + zero, as a 16-bit float, of a scale word."""
    low, _ = _halves((scales & 15) | magic, dtype)
    return low


@triton.jit
def scales_of(words, BITS: tl.constexpr):
    """Float32 of a scale word."""
    if BITS == 4:
        words = words & ~15
    return words.to(tl.float32, bitcast=True)
