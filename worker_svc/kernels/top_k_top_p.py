"""The likeliest token by logit and noise among those that top_k, top_p and min_p keep, without a sort.

Tokens are in order of their logits z [V], equal ones in order of their ids. Kept are those that have fewer than `top_k`
before them, less than `top_p` of the probability of the first `top_k` before them, and z >= max(z) + log(min_p): always
a prefix, never nothing. (A sort that is not stable may cut between equal logits at another id.)

What is wanted is argmax(z + noise) over the prefix, and that needs no prefix: take the argmax over all tokens, count
and weigh what comes before it, and if it is not kept, take the argmax over those before it, and so on. Since the argmax
is a sample of softmax(z), the first is kept with the probability of the prefix, 0.9 for top_p = 0.9, and each further
one leaves half of what is left, on average (the idea of FlashInfer's "Sorting-free GPU kernels for LLM sampling", 2025,
but here the noise is fixed, so that the result is that of a sort). The scan for what comes before a token looks only at
groups of tokens whose largest logit may be before it.

One thing does need the prefix of `top_k`: its probability, of which `top_p` takes its share. It is found by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from worker_svc.kernels.noise import CHOICE, gumbel, random_bits
from worker_svc.kernels.varlen import check_tensor

# Of a row's groups of tokens; a program of 512 threads holds the largest logits of so many in registers.
MAX_GROUPS: Final = 4096


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tokens of each row are kept; B rows."""

    top_k: torch.Tensor  # [B] int32; 0 for all
    top_p: torch.Tensor  # [B] float32; 1 for all
    min_p: torch.Tensor  # [B] float32; 0 for all

    def check(self, num_rows: int) -> None:
        """Raises: ValueError: names the tensor that has another shape, type or stride."""
        check_tensor("top_k", self.top_k, (num_rows,), torch.int32)
        check_tensor("top_p", self.top_p, (num_rows,), torch.float32)
        check_tensor("min_p", self.min_p, (num_rows,), torch.float32)


def filter_reference(scaled: torch.Tensor, filters: Filters) -> torch.Tensor:
    """-inf for tokens that are not kept.

    Args:
        scaled: [B, V] float32 logits, divided by the temperature.
    """
    vocab_size = scaled.shape[1]
    values, token_ids = scaled.double().sort(dim=1, descending=True, stable=True)
    ranks = torch.arange(vocab_size, device=scaled.device)
    is_kept = ranks < torch.where(filters.top_k > 0, filters.top_k, vocab_size)[:, None]
    likelihood = values.masked_fill(~is_kept, -torch.inf).softmax(dim=1)
    before = likelihood.cumsum(dim=1) - likelihood
    is_kept &= (before < torch.where(filters.top_p < 1, filters.top_p, 2.0)[:, None]) | (ranks == 0)
    is_kept &= values >= values[:, :1] + filters.min_p.log()[:, None]
    return scaled.masked_fill(torch.empty_like(is_kept).scatter_(1, token_ids, ~is_kept), -torch.inf)


def group_size(vocab_size: int, least: int) -> int:
    """Tokens whose largest logit is kept, as a power of two, so that there are at most `MAX_GROUPS`."""
    return max(least, int(triton.next_power_of_2(triton.cdiv(vocab_size, MAX_GROUPS))))


@triton.jit
def load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size):
    """Returns: top_k, at most V; top_p; min_p; and whether any of them leaves a token out."""
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    return top_k, top_p, min_p, (top_k < vocab_size) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def _flip(bits):
    """Between the bits of a float32 and an integer in the same order; its own inverse. int32 both."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(value):
    """An integer in the order of float32. Returns int64, so that two can be added."""
    return _flip(value.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    return _flip(key.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(values, k, largest):
    """A number that at least k of `values` reach, and that few others reach; `largest`: of `values`."""
    low, high = _key(tl.full([], float("-inf"), tl.float32)), _key(largest) + 1
    count = 0
    while (high - low > 1) & (count != k):
        middle = (low + high) >> 1
        count = tl.sum((values >= _value(middle)).to(tl.int32), axis=0)
        if count >= k:
            low = middle
        else:
            high = middle
    return _value(low)


@triton.jit
def _tokens(groups, PER_GROUP: tl.constexpr):
    """`PER_GROUP` consecutive numbers for each group, one after the other."""
    numbers = groups[:, None] * PER_GROUP + tl.arange(0, PER_GROUP)[None, :]
    return tl.reshape(numbers, (groups.shape[0] * PER_GROUP,))


@triton.jit
def _load_groups(scaled_ptr, active_ptr, first, num_active, GROUP: tl.constexpr, SCAN: tl.constexpr):
    """Groups of the list from `first`, their tokens and their logits, -inf after the end."""
    index = first + tl.arange(0, SCAN // GROUP)
    groups = tl.load(active_ptr + index, mask=index < num_active, other=-1)
    tokens = _tokens(groups, GROUP)
    return groups, tokens, tl.load(scaled_ptr + tokens, mask=tokens >= 0, other=float("-inf"))


@triton.jit
def _before(scaled_ptr, active_ptr, num_active, value, token, largest, GROUP: tl.constexpr, SCAN: tl.constexpr):
    """How many tokens come before the token with this logit, and their sum of exp(z - largest)."""
    counts = tl.zeros([SCAN], tl.int32)
    weights = tl.zeros([SCAN], tl.float32)
    for first in range(0, num_active, SCAN // GROUP):
        _, tokens, scaled = _load_groups(scaled_ptr, active_ptr, first, num_active, GROUP, SCAN)
        is_before = (scaled > value) | ((scaled == value) & (tokens < token))
        counts += is_before.to(tl.int32)
        weights += tl.where(is_before, tl.exp(scaled - largest), 0.0)
    return tl.sum(counts, axis=0), tl.sum(weights, axis=0)


@triton.jit
def _best_before(
    scaled_ptr, active_ptr, num_active, value, token, seed, position, GROUP: tl.constexpr, SCAN: tl.constexpr
):
    """Logit and id of the token with the largest logit + noise among those before the token with this logit."""
    scores = tl.full([SCAN], float("-inf"), tl.float32)
    winners = tl.full([SCAN], 2147483647, tl.int32)
    for first in range(0, num_active, SCAN // GROUP):
        groups, tokens, scaled = _load_groups(scaled_ptr, active_ptr, first, num_active, GROUP, SCAN)
        noise = gumbel(random_bits(seed, _tokens(groups, GROUP // 4), position, CHOICE))
        is_before = (scaled > value) | ((scaled == value) & (tokens < token))
        score = tl.where(is_before, scaled + noise, float("-inf"))
        # The list is in order, so that of equal scores the first is that of the lowest id.
        winners = tl.where(score > scores, tokens, winners)
        scores = tl.maximum(score, scores)
    is_best = scores == tl.max(scores, axis=0)
    winner = tl.min(tl.where(is_best, winners, 2147483647), axis=0)
    return tl.load(scaled_ptr + winner), winner


@triton.jit
def _mass_of_top_k(
    scaled_ptr, active_ptr, num_active, top_k, bound, largest, vocab_size, GROUP: tl.constexpr, SCAN: tl.constexpr
):
    """Sum of exp(z - largest) over the first `top_k` tokens, all of which have z >= bound."""
    low, high = _key(bound), _key(largest) + 1
    count = 0
    mass = 0.0
    # At least top_k tokens reach `low`; `count` reach `high`, at most top_k, and `mass` is theirs.
    while (high - low > 1) & (count < top_k):
        middle = (low + high) >> 1
        reached, reached_mass = _before(
            scaled_ptr, active_ptr, num_active, _value(middle), vocab_size, largest, GROUP, SCAN
        )
        if reached > top_k:
            low = middle
        else:
            high = middle
            count = reached
            mass = reached_mass
    # The rest are equal.
    return mass + (top_k - count).to(tl.float32) * tl.exp(_value(low) - largest)


@triton.jit
def first_kept(
    token,
    seed,
    position,
    top_k,
    top_p,
    min_p,
    scaled_ptr,  # [V] logits of the row, divided by the temperature
    group_max_ptr,  # [num_groups] the largest of each GROUP tokens
    active_ptr,  # [num_groups] int32, written here
    split_max_ptr,  # [num_splits] the largest of each split
    split_sum_ptr,  # [num_splits] the sum of exp(z - that)
    vocab_size,
    num_groups,
    num_splits,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The kept token with the largest logit + noise; `token` has the largest of all."""
    splits = tl.arange(0, BLOCK_SPLITS)
    split_max = tl.load(split_max_ptr + splits, mask=splits < num_splits, other=float("-inf"))
    split_sum = tl.load(split_sum_ptr + splits, mask=splits < num_splits, other=0.0)
    groups = tl.arange(0, BLOCK_GROUPS)
    group_max = tl.load(group_max_ptr + groups, mask=groups < num_groups, other=float("-inf"))
    value = tl.load(scaled_ptr + token)
    largest = tl.max(split_max, axis=0)
    least = tl.where(min_p > 0.0, largest + tl.log(tl.maximum(min_p, 1e-30)), float("-inf"))

    # Whatever is before a token that is kept has a logit of at least `bound`.
    bound = tl.full([], float("-inf"), tl.float32)
    if top_k < vocab_size:
        bound = _kth_largest(group_max, top_k, largest)
    if (top_k == vocab_size) | (top_p >= 1.0):
        bound = tl.maximum(bound, tl.maximum(value, least))
    is_active = (group_max >= bound) & (groups < num_groups)
    num_active = tl.sum(is_active.to(tl.int32), axis=0)
    places = tl.cumsum(is_active.to(tl.int32), axis=0) - 1
    tl.store(active_ptr + places, groups, mask=is_active)
    # What one thread stored, others load.
    tl.debug_barrier()

    # Beyond all that there is, if all may be kept: rounding must cut nothing off.
    limit = vocab_size * 2.0
    if top_p < 1.0:
        if top_k < vocab_size:
            limit = top_p * _mass_of_top_k(
                scaled_ptr, active_ptr, num_active, top_k, bound, largest, vocab_size, GROUP, SCAN
            )
        else:
            limit = top_p * tl.sum(split_sum * tl.exp(split_max - largest), axis=0)
    count, mass = _before(scaled_ptr, active_ptr, num_active, value, token, largest, GROUP, SCAN)
    while (count > 0) & ((count >= top_k) | (mass >= limit) | (value < least)):
        value, token = _best_before(scaled_ptr, active_ptr, num_active, value, token, seed, position, GROUP, SCAN)
        count, mass = _before(scaled_ptr, active_ptr, num_active, value, token, largest, GROUP, SCAN)
    return token
