"""What the matmul kernels share: which tile a program computes, how K is split, how a tile is finished.

All compute y = x W^T as tiles y^T[BLOCK_N, BLOCK_T] = W[BLOCK_N, K] x[BLOCK_T, K]^T: the weight is the first operand,
which Hopper's matrix unit takes from registers too, 64 rows at a time, while the tokens may be as few as 8.

With few tokens there are too few tiles to keep the memory busy, so K is split over SPLITS programs a tile. Each stores
its part in float32 and counts itself; the one that comes last adds all parts in order and finishes the tile: one
launch, and the same bits whichever comes last. It leaves its counter at zero for the next launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

from worker_svc.kernels.tuning import Config
from worker_svc.kernels.varlen import check_tensor

# Programs a multiprocessor: enough loads in flight for its share of the memory, and few left over at the end.
WAVES: Final = 4
MAX_SPLITS: Final = 16
# A shorter part of K does not pay for its share of the sum.
MIN_SPLIT_STEPS: Final = 2
# Up to here a weight is read by one tile of tokens, and K may be split.
FEW_TOKENS: Final = 64
# Neighbouring programs share these many tiles of the weight, which stay in the L2 cache.
GROUP_TILES: Final = tl.constexpr(8)
MIN_BLOCK_N: Final = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """A grid, and what of its arguments follows from the shapes."""

    grid: tuple[int, int]
    splits: int
    split_size: int  # of K, a multiple of BLOCK_K

    def partials(self, num_tokens: int, out_features: int, device: torch.device) -> torch.Tensor | None:
        """Where parts of sums go."""
        if self.splits == 1:
            return None
        return torch.empty((self.splits, num_tokens, out_features), dtype=torch.float32, device=device)


def plan_launch(num_tokens: int, out_features: int, in_features: int, config: Config, multiprocessors: int) -> Launch:
    """SPLITS of the config if it has been measured, else enough programs for the device."""
    blocks = config.blocks
    tiles = triton.cdiv(num_tokens, blocks["BLOCK_T"]) * triton.cdiv(out_features, blocks["BLOCK_N"])
    steps = triton.cdiv(in_features, blocks["BLOCK_K"])
    splits = blocks.get("SPLITS") or WAVES * multiprocessors // tiles
    splits = max(1, min(splits, steps // MIN_SPLIT_STEPS, MAX_SPLITS)) if num_tokens <= FEW_TOKENS else 1
    steps_each = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_each)
    return Launch((tiles, splits), splits, steps_each * blocks["BLOCK_K"])


def enough_programs(multiprocessors: int) -> int:
    """Two for each multiprocessor, or nearly: what they have on its way together is enough for the memory."""
    return 2 * multiprocessors * 15 // 16


def narrow_rows(rows: int, multiprocessors: int) -> int:
    """BLOCK_N for so many rows of weights, if possible with enough programs and without splits."""
    return next((size for size in (64, 32) if rows >= size * enough_programs(multiprocessors)), 16)


def block_tokens(num_tokens: int, most: int) -> int:
    """BLOCK_T: a power of two from 16 to `most`."""
    return min(max(int(triton.next_power_of_2(num_tokens)), 16), most)


def make_counters(out_features: int, device: torch.device) -> torch.Tensor:
    """Zeros that the programs of a tile count themselves with, one set for each weight.

    Launches that share counters must not overlap: a weight is used by one stream at a time.
    """
    return torch.zeros(triton.cdiv(out_features, MIN_BLOCK_N), dtype=torch.int32, device=device)


def check_input(x: torch.Tensor, in_features: int) -> int:
    """The number of tokens of x, [T, in]; raises ValueError if it is something else."""
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [T, {in_features}]")
    check_tensor("x", x, (x.shape[0], in_features))
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}, expected bfloat16, float16 or float32")
    return x.shape[0]


def make_output(
    out: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`out`, checked, or a new tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_tensor("out", out, shape, dtype)
    return out


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What is added to a product before it is rounded."""

    bias: torch.Tensor | None  # [out]
    residual: torch.Tensor | None  # [T, out]; rows may be strided

    def check(self, num_tokens: int, out_features: int) -> None:
        if self.bias is not None:
            check_tensor("bias", self.bias, (out_features,))
        if self.residual is not None:
            check_tensor("residual", self.residual, (num_tokens, out_features))

    def arguments(self) -> dict[str, Any]:
        residual = self.residual
        return {
            "bias_ptr": self.bias,
            "residual_ptr": residual,
            "residual_stride": 0 if residual is None else residual.stride(0),
        }


@triton.jit
def locate_tile(T, OUT, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's tile: its place along the tokens and along the rows of the weight."""
    program = tl.program_id(0)
    token_tiles = tl.cdiv(T, BLOCK_T)
    row_tiles = tl.cdiv(OUT, BLOCK_N)
    group = program // (GROUP_TILES * token_tiles)
    size = tl.minimum(row_tiles - group * GROUP_TILES, GROUP_TILES)
    place = program % (GROUP_TILES * token_tiles)
    return place // size, group * GROUP_TILES + place % size


@triton.jit
def finish_tile(
    total,
    token_tile,
    row_tile,
    y_ptr,
    y_stride,
    bias_ptr,
    residual_ptr,
    residual_stride,
    partials_ptr,
    counters_ptr,
    T,
    OUT,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store `total`, [BLOCK_N, BLOCK_T], or the sum of all splits' totals, with what is added to it."""
    tokens = (token_tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    rows = (row_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (tokens < T) & (rows < OUT)
    total = tl.trans(total)
    is_last = True
    if SPLITS > 1:
        places = partials_ptr + tokens * OUT + rows
        tl.store(places + tl.program_id(1) * T * OUT, total, mask=mask)
        # Of the whole program, before it counts itself.
        tl.debug_barrier()
        is_last = tl.atomic_add(counters_ptr + row_tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(counters_ptr + row_tile, 0)
            total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                total += tl.load(places + split * T * OUT, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if bias_ptr is not None:
            total += tl.load(bias_ptr + rows, mask=rows < OUT, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            total += tl.load(residual_ptr + tokens * residual_stride + rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + tokens * y_stride + rows, total.to(y_ptr.dtype.element_ty), mask=mask)
