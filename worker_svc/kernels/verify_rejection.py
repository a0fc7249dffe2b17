"""Speculative decoding by rejection (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

Draft x_i, sampled from q_i, stands if u_i q_i(x_i) < p_i(x_i), u_i uniform. At the first that falls, n, a token is
sampled from max(p_n - q_n, 0), normed; after drafts that all stand, from p_n. What is emitted has the distribution of
the target, p, but which tokens it is depends on the drafts; `verify` says when that is worth having. u_i and the noise
of the last token come from (seed, position) in streams of their own, so that the same drafts give the same text.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from worker_svc.kernels.noise import ACCEPTANCE, REPLACEMENT, gumbel, random_bits, random_words, uniform
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor
from worker_svc.noise import gumbel as gumbel_reference
from worker_svc.noise import philox

# As many splits of 128256 tokens as an H100 has multiprocessors, nearly.
DEFAULT: Final = Config({"BLOCK": 1024}, num_warps=4)


def verify_rejection_reference(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`verify_rejection` in plain torch."""
    num_rows, num_positions, vocab_size = target_probs.shape
    index = torch.arange(num_positions, device=seeds.device)
    p = target_probs[:, :-1].gather(2, draft_token_ids[:, :, None])[:, :, 0]
    q = draft_probs.gather(2, draft_token_ids[:, :, None])[:, :, 0]
    bits = _bits_reference(seeds, positions[:, None] + index[:-1], torch.zeros_like(index[:-1]), ACCEPTANCE.value)
    u = ((bits[0].float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    stands = (u * q < p) & (index[:-1] < num_drafts[:, None])
    num_accepted = stands.long().cumprod(dim=1).sum(dim=1)

    rows, has_fallen = torch.arange(num_rows, device=seeds.device), num_accepted < num_drafts
    drafted = draft_probs[rows, num_accepted.clamp(max=num_positions - 2)].masked_fill(~has_fallen[:, None], 0.0)
    rest = (target_probs[rows, num_accepted] - drafted).clamp(min=0)
    quads = torch.arange(triton.cdiv(vocab_size, 4), device=seeds.device)
    bits = _bits_reference(seeds, (positions + num_accepted)[:, None], quads, REPLACEMENT.value)
    noise = gumbel_reference(torch.stack(bits, dim=-1).flatten(1)[:, :vocab_size])
    replacement = (rest.log() + noise).argmax(dim=1)
    # Nothing is left where p <= q by rounding only.
    padded = F.pad(draft_token_ids, (0, 1))
    replacement = torch.where((rest > 0).any(dim=1), replacement, padded[rows, num_accepted])
    token_ids = torch.where(index == num_accepted[:, None], replacement[:, None], padded)
    return num_accepted, token_ids.masked_fill(index > num_accepted[:, None], -1)


def _bits_reference(
    seeds: torch.Tensor, positions: torch.Tensor, quads: torch.Tensor, stream: int
) -> tuple[torch.Tensor, ...]:
    """`seeds`: [B]; `positions`: [B, n] or [B, 1]; `quads`: [n]; returns four of [B, n]."""
    key = (seeds[:, None] & 0xFFFFFFFF, seeds[:, None] >> 32 & 0xFFFFFFFF)
    zero = torch.zeros_like(quads)
    return philox((quads + 0 * positions, positions + zero, zero + stream, zero), key)


@triton.jit
def _count_accepted(
    row,
    target_probs_ptr,
    draft_probs_ptr,
    draft_token_ids_ptr,
    num_drafts,
    seed,
    position,
    vocab_size,
    NUM_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """How many drafts of a row stand."""
    index = tl.arange(0, BLOCK_K)
    is_draft = index < num_drafts
    drafts = tl.load(draft_token_ids_ptr + row * NUM_DRAFTS + index, mask=is_draft, other=0)
    p_ptrs = target_probs_ptr + (row * (NUM_DRAFTS + 1) + index) * vocab_size + drafts
    q_ptrs = draft_probs_ptr + (row * NUM_DRAFTS + index) * vocab_size + drafts
    p = tl.load(p_ptrs, mask=is_draft, other=0.0)
    q = tl.load(q_ptrs, mask=is_draft, other=0.0)
    words = random_words(seed, tl.zeros_like(index), position + index, ACCEPTANCE)
    stands = (uniform(words[0]) * q < p) & is_draft
    return tl.min(tl.where(stands, BLOCK_K, index), axis=0)


@triton.jit
def _replace_kernel(
    target_probs_ptr,
    draft_probs_ptr,
    draft_token_ids_ptr,
    num_drafts_ptr,
    seeds_ptr,
    positions_ptr,
    num_accepted_ptr,
    best_scores_ptr,
    best_tokens_ptr,
    vocab_size,
    NUM_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One split of one row: its best candidate for the token after the drafts that stand."""
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0)
    num_drafts = tl.minimum(tl.load(num_drafts_ptr + row), NUM_DRAFTS)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    # Each split counts for itself, which is cheaper than a kernel more.
    num_accepted = _count_accepted(
        row,
        target_probs_ptr,
        draft_probs_ptr,
        draft_token_ids_ptr,
        num_drafts,
        seed,
        position,
        vocab_size,
        NUM_DRAFTS,
        BLOCK_K,
    )
    if split == 0:
        tl.store(num_accepted_ptr + row, num_accepted.to(tl.int64))
    tokens = split * BLOCK + tl.arange(0, BLOCK)
    p_ptrs = target_probs_ptr + (row * (NUM_DRAFTS + 1) + num_accepted) * vocab_size + tokens
    q_ptrs = draft_probs_ptr + (row * NUM_DRAFTS + num_accepted) * vocab_size + tokens
    p = tl.load(p_ptrs, mask=tokens < vocab_size, other=0.0)
    # After the last draft there is no q.
    q = tl.load(q_ptrs, mask=tokens < tl.where(num_accepted < num_drafts, vocab_size, 0), other=0.0)
    quads = split * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    noise = gumbel(random_bits(seed, quads, position + num_accepted, REPLACEMENT))
    # The least float32 only keeps the logarithm finite where its value is not used.
    scores = tl.where(p > q, tl.log(tl.maximum(p - q, 1e-38)) + noise, float("-inf"))
    best, place = tl.max(scores, axis=0, return_indices=True)
    partial = row * tl.num_programs(0) + split
    tl.store(best_scores_ptr + partial, best)
    tl.store(best_tokens_ptr + partial, split * BLOCK + place)


@triton.jit
def _finish_kernel(
    draft_token_ids_ptr,
    num_accepted_ptr,
    best_scores_ptr,
    best_tokens_ptr,
    token_ids_ptr,
    num_splits,
    NUM_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    num_accepted = tl.load(num_accepted_ptr + row)
    splits = tl.arange(0, BLOCK_SPLITS)
    first = row * num_splits
    scores = tl.load(best_scores_ptr + first + splits, mask=splits < num_splits, other=float("-inf"))
    best, place = tl.max(scores, axis=0, return_indices=True)
    replacement = tl.load(best_tokens_ptr + first + place).to(tl.int64)
    drafts_ptr = draft_token_ids_ptr + row * NUM_DRAFTS
    # Where the draft fell by rounding only, p <= q everywhere: nothing is left to sample from, and it may as well stay.
    fallen = tl.load(drafts_ptr + num_accepted, mask=num_accepted < NUM_DRAFTS, other=0)
    last = tl.where(best > float("-inf"), replacement, fallen)
    index = tl.arange(0, BLOCK_K)
    drafts = tl.load(drafts_ptr + index, mask=index < NUM_DRAFTS, other=0)
    token_ids = tl.where(index == num_accepted, last, drafts)
    token_ids = tl.where(index <= num_accepted, token_ids, -1)
    tl.store(token_ids_ptr + row * (NUM_DRAFTS + 1) + index, token_ids, mask=index <= NUM_DRAFTS)


def verify_rejection(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept or reject drafts sampled from `draft_probs`, so that what is emitted has the target's distribution.

    Args:
        target_probs: [B, K + 1, V] float32, contiguous; after temperature and filters, finite, each a distribution.
        draft_probs: [B, K, V] float32, contiguous; what each draft was sampled from.
        draft_token_ids: [B, K] int64, contiguous; below V.
        num_drafts: [B] int64, how many of the K are drafts.
        seeds: [B] int64 (`noise.seeds_tensor`).
        positions: [B] int64, index in the completion of the first draft.
        config: None for the one that `tuning` has.

    Returns:
        How many drafts stand, [B] int64, and token ids [B, K + 1] int64: that many, one more, then -1.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    if target_probs.ndim != 3 or target_probs.shape[1] < 2:
        raise ValueError(f"target_probs has shape {tuple(target_probs.shape)}, expected [B, K + 1, V] with K > 0")
    num_rows, num_positions, vocab_size = target_probs.shape
    columns = (target_probs, draft_probs, draft_token_ids, num_drafts, seeds, positions)
    _check_rejection(*columns)
    num_accepted = torch.empty(num_rows, dtype=torch.int64, device=seeds.device)
    token_ids = torch.empty((num_rows, num_positions), dtype=torch.int64, device=seeds.device)
    if num_rows == 0:
        return num_accepted, token_ids
    config = config or choose("verify_rejection", "", DEFAULT, seeds.device)
    num_splits = triton.cdiv(vocab_size, config.blocks["BLOCK"])
    best_scores = torch.empty((num_rows, num_splits), dtype=torch.float32, device=seeds.device)
    best_tokens = torch.empty_like(best_scores, dtype=torch.int32)
    shape = {"NUM_DRAFTS": num_positions - 1, "BLOCK_K": triton.next_power_of_2(num_positions)}
    _replace_kernel[(num_splits, num_rows)](
        *columns, num_accepted, best_scores, best_tokens, vocab_size, **shape, **config.arguments()
    )
    _finish_kernel[(num_rows,)](
        draft_token_ids,
        num_accepted,
        best_scores,
        best_tokens,
        token_ids,
        num_splits,
        **shape,
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        num_warps=4,
    )
    return num_accepted, token_ids


def _check_rejection(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    num_drafts: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    num_rows, num_positions, vocab_size = target_probs.shape
    check_tensor("target_probs", target_probs, tuple(target_probs.shape), torch.float32)
    check_tensor("draft_probs", draft_probs, (num_rows, num_positions - 1, vocab_size), torch.float32)
    check_tensor("draft_token_ids", draft_token_ids, (num_rows, num_positions - 1), torch.int64)
    for name, column in (("num_drafts", num_drafts), ("seeds", seeds), ("positions", positions)):
        check_tensor(name, column, (num_rows,), torch.int64)
    for name, tensor in (
        ("target_probs", target_probs),
        ("draft_probs", draft_probs),
        ("draft_token_ids", draft_token_ids),
    ):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
