"""Speculative decoding: which of the drafted tokens stand, and the token after them.

Our sampler is a function of logits, seed and position, argmax(z + noise): so the target's own token is sampled at each
drafted position, and drafts stand while they are equal to it. What is emitted is what plain decoding would have
emitted, greedy or not, whatever was drafted; a stream resumed after a recovery goes on as if there had been no drafts.

A draft that does not depend on the noise, x, stands with probability p(x): no less than with rejection, for which it is
a sample of q = 1 at x. A draft model that samples with the same seeds and positions agrees with a probability of at
least (1 - d) / (1 + d), d the total variation distance of q and p (Daliri, Musco and Suresh 2024). With noise of its
own it would agree by chance only: for that there is `verify_rejection`, which has the probability 1 - d, the highest
there is, but makes the text depend on the drafts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker_svc.kernels.varlen import check_tensor


def verify_reference(
    sampled: torch.Tensor, draft_token_ids: torch.Tensor, num_drafts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`verify` in plain torch."""
    index = torch.arange(sampled.shape[1], device=sampled.device)
    stands = (sampled[:, :-1] == draft_token_ids) & (index[:-1] < num_drafts[:, None])
    num_accepted = stands.long().cumprod(dim=1).sum(dim=1)
    return num_accepted, sampled.masked_fill(index > num_accepted[:, None], -1)


@triton.jit
def _verify_kernel(
    sampled_ptr,
    draft_token_ids_ptr,
    num_drafts_ptr,
    num_accepted_ptr,
    token_ids_ptr,
    sampled_stride,
    draft_stride,
    NUM_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_K)
    sampled = tl.load(sampled_ptr + row * sampled_stride + index, mask=index <= NUM_DRAFTS, other=-1)
    drafts = tl.load(draft_token_ids_ptr + row * draft_stride + index, mask=index < NUM_DRAFTS, other=-1)
    stands = (sampled == drafts) & (index < tl.minimum(tl.load(num_drafts_ptr + row), NUM_DRAFTS))
    num_accepted = tl.min(tl.where(stands, BLOCK_K, index), axis=0)
    tl.store(num_accepted_ptr + row, num_accepted.to(tl.int64))
    token_ids = tl.where(index <= num_accepted, sampled, -1)
    tl.store(token_ids_ptr + row * (NUM_DRAFTS + 1) + index, token_ids, mask=index <= NUM_DRAFTS)


def verify(
    sampled: torch.Tensor, draft_token_ids: torch.Tensor, num_drafts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep drafts while they are what the target chose itself.

    Args:
        sampled: [B, K + 1] int64, the target's token at each drafted position and the one after; rows may be strided.
        draft_token_ids: [B, K] int64; rows may be strided.
        num_drafts: [B] int64, how many of the K are drafts.

    Returns:
        How many drafts stand, [B] int64, and token ids [B, K + 1] int64: that many, one more, then -1.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    if draft_token_ids.ndim != 2 or draft_token_ids.shape[1] == 0:
        raise ValueError(f"draft_token_ids has shape {tuple(draft_token_ids.shape)}, expected [B, K] with K > 0")
    num_rows, num_positions = len(draft_token_ids), draft_token_ids.shape[1] + 1
    check_tensor("draft_token_ids", draft_token_ids, tuple(draft_token_ids.shape), torch.int64)
    check_tensor("sampled", sampled, (num_rows, num_positions), torch.int64)
    check_tensor("num_drafts", num_drafts, (num_rows,), torch.int64)
    num_accepted = torch.empty(num_rows, dtype=torch.int64, device=sampled.device)
    token_ids = torch.empty((num_rows, num_positions), dtype=torch.int64, device=sampled.device)
    if num_rows:
        _verify_kernel[(num_rows,)](
            sampled,
            draft_token_ids,
            num_drafts,
            num_accepted,
            token_ids,
            sampled.stride(0),
            draft_token_ids.stride(0),
            NUM_DRAFTS=num_positions - 1,
            BLOCK_K=triton.next_power_of_2(num_positions),
            num_warps=1,
        )
    return num_accepted, token_ids
