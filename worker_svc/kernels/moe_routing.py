"""Which experts each token goes to, and the order in which a grouped matmul takes the pairs of both.

    scores[t]  = softmax(logits[t]) or sigmoid(logits[t]), in float32
    experts[t] = the K largest of scores[t] + bias; of equals the first
    weights[t] = scores[t, experts[t]], divided by their sum if so wanted, times a factor

Pair p = t * K + j is token t with its j-th expert. `align` puts pairs in order of their experts, each expert's in order
and padded to whole tiles of BLOCK_T rows, so that every tile has one expert. How many tiles there are is known on the
device alone; the host launches as many as there can be:

    tiles <= A + (P - A) / BLOCK_T,   A = min(P, X) experts with at least one of the P pairs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
import triton
import triton.language as tl

from worker_svc.kernels.varlen import check_tensor

Scoring = Literal["softmax", "sigmoid"]
# Elements of a program's [tokens, experts] or [pairs, experts]: 64 registers a thread.
TABLE: Final = 8192
CHUNK: Final = 1024  # pairs of a program of `align`


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of each token, best first."""

    experts: torch.Tensor  # [T, K] int32
    weights: torch.Tensor  # [T, K] float32


@dataclass(frozen=True, slots=True)
class Alignment:
    """Pairs in tiles of one expert each."""

    pairs: torch.Tensor  # [tiles * BLOCK_T] int32; P where there is none
    tile_experts: torch.Tensor  # [tiles] int32; -1 for tiles that are not used, whose pairs nobody wrote
    block_t: int
    num_pairs: int  # P
    num_experts: int  # X

    @property
    def num_tiles(self) -> int:
        return len(self.tile_experts)


def route_reference(
    logits: torch.Tensor,
    top_k: int,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    factor: float = 1.0,
    bias: torch.Tensor | None = None,
) -> Routing:
    """`route` in plain torch."""
    scores = logits.float().softmax(dim=-1) if scoring == "softmax" else logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(experts.to(torch.int32), weights * factor)


def align_reference(experts: torch.Tensor, num_experts: int, block_t: int) -> Alignment:
    """`align` in plain torch, on the host."""
    pairs, tiles = [], []
    flat = experts.flatten()
    num_pairs = len(flat)
    for expert in range(num_experts):
        found = (flat == expert).nonzero().flatten().tolist()
        pairs += found + [num_pairs] * (-len(found) % block_t)
        tiles += [expert] * triton.cdiv(len(found), block_t)
    return Alignment(
        torch.tensor(pairs, dtype=torch.int32), torch.tensor(tiles, dtype=torch.int32), block_t, num_pairs, num_experts
    )


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    logits_ptr,
    logits_stride,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    T,
    factor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
):
    """Some tokens. NaN among the logits gives some experts, not necessarily different ones, and weights of NaN."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_X)
    mask = (tokens < T)[:, None] & (columns < NUM_EXPERTS)[None, :]
    places = tokens.to(tl.int64)[:, None] * logits_stride + columns[None, :]
    logits = tl.load(logits_ptr + places, mask=mask, other=0.0).to(tl.float32)
    is_expert = (columns < NUM_EXPERTS)[None, :]
    if IS_SOFTMAX:
        logits = tl.where(is_expert, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores /= tl.sum(scores, axis=1)[:, None]
    else:
        scores = tl.sigmoid(logits)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + columns, mask=columns < NUM_EXPERTS, other=0.0)[None, :]
    choice = tl.where(is_expert, choice, float("-inf"))

    ranks = tl.arange(0, BLOCK_TOP)
    experts = tl.zeros((BLOCK_T, BLOCK_TOP), dtype=tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_TOP), dtype=tl.float32)
    for rank in tl.static_range(TOP_K):
        best = tl.minimum(tl.argmax(choice, axis=1), NUM_EXPERTS - 1)
        is_best = columns[None, :] == best[:, None]
        weight = tl.sum(tl.where(is_best, scores, 0.0), axis=1)
        choice = tl.where(is_best, float("-inf"), choice)
        experts = tl.where((ranks == rank)[None, :], best[:, None], experts)
        weights = tl.where((ranks == rank)[None, :], weight[:, None], weights)
    if RENORMALIZES:
        weights /= tl.sum(weights, axis=1)[:, None]
    places = tokens[:, None] * TOP_K + ranks[None, :]
    mask = (tokens < T)[:, None] & (ranks < TOP_K)[None, :]
    tl.store(experts_ptr + places, experts, mask=mask)
    tl.store(weights_ptr + places, weights * factor, mask=mask)


def route(
    logits: torch.Tensor,
    top_k: int,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    factor: float = 1.0,
    bias: torch.Tensor | None = None,
) -> Routing:
    """Choose experts.

    Args:
        logits: [T, X]; rows may be strided.
        renormalize: whether a token's weights add up to `factor`.
        bias: [X] float32, added to scores for the choice alone.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    num_tokens, num_experts = logits.shape
    check_tensor("logits", logits, (num_tokens, num_experts))
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts}")
    if bias is not None:
        check_tensor("bias", bias, (num_experts,), torch.float32)
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return Routing(experts, weights)
    block_x = triton.next_power_of_2(num_experts)
    # A warp a token: few tokens are to be spread over the device.
    block_t = min(4, TABLE // block_x)
    _route_kernel[(triton.cdiv(num_tokens, block_t),)](
        logits,
        logits.stride(0),
        bias,
        experts,
        weights,
        num_tokens,
        factor,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        IS_SOFTMAX=scoring == "softmax",
        RENORMALIZES=renormalize,
        BLOCK_T=block_t,
        BLOCK_X=block_x,
        BLOCK_TOP=triton.next_power_of_2(top_k),
    )
    return Routing(experts, weights)


@triton.jit
def _load_experts(experts_ptr, first, P, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """Which of some pairs goes to which expert: pairs [BLOCK_P], and [BLOCK_P, BLOCK_X] int32 of 0 and 1."""
    pairs = first + tl.arange(0, BLOCK_P)
    experts = tl.load(experts_ptr + pairs, mask=pairs < P, other=-1)
    return pairs, (experts[:, None] == tl.arange(0, BLOCK_X)[None, :]).to(tl.int32)


@triton.jit
def _count_chunk(experts_ptr, chunk, P, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """How many pairs of a chunk go to each expert: [BLOCK_X] int32."""
    counts = tl.zeros((BLOCK_X,), dtype=tl.int32)
    for first in range(0, CHUNK, BLOCK_P):
        _, is_of = _load_experts(experts_ptr, chunk * CHUNK + first, P, BLOCK_P, BLOCK_X)
        counts += tl.sum(is_of, axis=0)
    return counts


@triton.jit(do_not_specialize=["P"])
def _count_kernel(experts_ptr, counts_ptr, P, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """The counts of one chunk."""
    chunk = tl.program_id(0)
    counts = _count_chunk(experts_ptr, chunk, P, CHUNK, BLOCK_P, BLOCK_X)
    tl.store(counts_ptr + chunk * BLOCK_X + tl.arange(0, BLOCK_X), counts)


@triton.jit(do_not_specialize=["P", "num_chunks", "num_tiles"])
def _align_kernel(
    experts_ptr,
    counts_ptr,
    pairs_ptr,
    tile_experts_ptr,
    P,
    num_chunks,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The places of one chunk's pairs; the first program also writes what is left of tiles, and their experts.

    Args:
        counts_ptr: [chunks, BLOCK_X]; None if there is but one chunk.
    """
    chunk = tl.program_id(0)
    columns = tl.arange(0, BLOCK_X)
    before = tl.zeros((BLOCK_X,), dtype=tl.int32)  # of earlier chunks
    totals = tl.zeros((BLOCK_X,), dtype=tl.int32)
    if counts_ptr is None:
        totals = _count_chunk(experts_ptr, chunk, P, CHUNK, BLOCK_P, BLOCK_X)
    else:
        for other in range(num_chunks):
            counts = tl.load(counts_ptr + other * BLOCK_X + columns)
            totals += counts
            before += tl.where(other < chunk, counts, 0)
    tiles = tl.cdiv(totals, BLOCK_T)
    ends = tl.cumsum(tiles, axis=0)
    starts = (ends - tiles) * BLOCK_T

    places = starts + before
    for first in range(0, CHUNK, BLOCK_P):
        pairs, is_of = _load_experts(experts_ptr, chunk * CHUNK + first, P, BLOCK_P, BLOCK_X)
        ranks = tl.cumsum(is_of, axis=0) - 1
        tl.store(pairs_ptr + tl.sum(is_of * (places[None, :] + ranks), axis=1), pairs, mask=pairs < P)
        places += tl.sum(is_of, axis=0)

    if chunk == 0:
        for row in range(BLOCK_T):
            tl.store(pairs_ptr + starts + totals + row, P, mask=totals + row < tiles * BLOCK_T)
        for first in range(0, num_tiles, BLOCK_P):
            tile = first + tl.arange(0, BLOCK_P)
            experts = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
            experts = tl.where(experts < NUM_EXPERTS, experts, -1)
            tl.store(tile_experts_ptr + tile, experts, mask=tile < num_tiles)


def align(experts: torch.Tensor, num_experts: int, block_t: int) -> Alignment:
    """Put pairs in order of their experts.

    Args:
        experts: [T, K] int32, contiguous, each of 0 to X - 1.
        block_t: rows of a tile.

    Raises:
        ValueError: names the tensor and the shape expected.
    """
    check_tensor("experts", experts, tuple(experts.shape), torch.int32)
    if not experts.is_contiguous():
        raise ValueError(f"experts has strides {experts.stride()}, expected contiguous rows")
    num_pairs = experts.numel()
    most_active = min(num_pairs, num_experts)
    num_tiles = most_active + (num_pairs - most_active) // block_t
    pairs = torch.empty(num_tiles * block_t, dtype=torch.int32, device=experts.device)
    tile_experts = torch.empty(num_tiles, dtype=torch.int32, device=experts.device)
    alignment = Alignment(pairs, tile_experts, block_t, num_pairs, num_experts)
    if num_pairs == 0:
        return alignment
    sizes = chunk_sizes(num_pairs, num_experts)
    num_chunks = triton.cdiv(num_pairs, sizes["CHUNK"])
    counts = None
    if num_chunks > 1:
        counts = torch.empty((num_chunks, sizes["BLOCK_X"]), dtype=torch.int32, device=experts.device)
        _count_kernel[(num_chunks,)](experts, counts, num_pairs, **sizes)
    _align_kernel[(num_chunks,)](
        experts,
        counts,
        pairs,
        tile_experts,
        num_pairs,
        num_chunks,
        num_tiles,
        NUM_EXPERTS=num_experts,
        BLOCK_T=block_t,
        **sizes,
    )
    return alignment


def chunk_sizes(num_pairs: int, num_experts: int) -> dict[str, int]:
    """What a program of `align` takes, and how much of it at once."""
    chunk = min(max(triton.next_power_of_2(num_pairs), 16), CHUNK)
    block_x = triton.next_power_of_2(num_experts)
    return {"CHUNK": chunk, "BLOCK_P": min(chunk, max(TABLE // block_x, 16), 256), "BLOCK_X": block_x}
