"""What changes logits before a token is chosen: penalties for what a row has seen, and bias of single tokens.

    repetition (Keskar et al. 2019, section 4.1), of tokens in prompt or completion:   l > 0 ? l / r : l * r
    frequency and presence (OpenAI), by `count` in the completion:                     l -= f * count + p * [count > 0]
    bias:                                                                              l += value

What rows have seen is kept on the device: `state` [P, V] int32 has a row for each sequence with penalties, twice the
count in the completion, plus 1 if the token is in the prompt. A row is zeroed when a sequence takes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from worker_svc.kernels.varlen import check_tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """What rows have seen, and what that costs them; B rows."""

    slots: torch.Tensor  # [B] int32: which row of `state` is theirs; -1 for rows without penalties
    state: torch.Tensor  # [P, V] int32, contiguous
    repetition: torch.Tensor  # [B] float32; 1 for none
    frequency: torch.Tensor  # [B] float32
    presence: torch.Tensor  # [B] float32

    def check(self, num_rows: int, vocab_size: int) -> None:
        """Raises: ValueError: names the tensor that has another shape, type or stride."""
        check_tensor("slots", self.slots, (num_rows,), torch.int32)
        _check_state(self.state, vocab_size)
        for name in ("repetition", "frequency", "presence"):
            check_tensor(name, getattr(self, name), (num_rows,), torch.float32)


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to single logits: logit bias, and -inf for stop tokens before `min_tokens`; n entries by row."""

    offsets: torch.Tensor  # [B + 1] int32: row b has the entries from [b] to [b + 1]
    token_ids: torch.Tensor  # [n] int32
    values: torch.Tensor  # [n] float32
    until: torch.Tensor  # [n] int32: holds at positions in the completion below this

    def check(self, num_rows: int) -> None:
        """Raises: ValueError: names the tensor that has another shape, type or stride."""
        check_tensor("offsets", self.offsets, (num_rows + 1,), torch.int32)
        check_tensor("token_ids", self.token_ids, (len(self.token_ids),), torch.int32)
        check_tensor("values", self.values, (len(self.token_ids),), torch.float32)
        check_tensor("until", self.until, (len(self.token_ids),), torch.int32)


def penalize_reference(logits: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """`logits`: [B, V] float32; returns the same."""
    state = penalties.state[penalties.slots.clamp(min=0)]
    is_seen, counts = state > 0, state >> 1
    repetition = penalties.repetition[:, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalized = torch.where(is_seen, repeated, logits)
    penalized = penalized - penalties.frequency[:, None] * counts - penalties.presence[:, None] * (counts > 0)
    return torch.where((penalties.slots >= 0)[:, None], penalized, logits)


def add_bias_reference(logits: torch.Tensor, bias: Bias, positions: torch.Tensor) -> torch.Tensor:
    """`logits`: [B, V] float32; `positions`: [B]; returns the same as `logits`."""
    rows = torch.repeat_interleave(bias.offsets.diff().long())
    holds = positions[rows] < bias.until[: len(rows)]
    token_ids, values = bias.token_ids[: len(rows)].long(), bias.values[: len(rows)]
    return logits.index_put((rows[holds], token_ids[holds]), values[holds], accumulate=True)


@triton.jit
def penalize(logits, state, repetition, frequency, presence):
    """`logits`: [n] float32; `state`: [n] int32; the others scalars. Returns [n] float32."""
    ratio = tl.where(logits > 0, 1.0 / repetition, repetition)
    logits = tl.where(state > 0, logits * ratio, logits)
    count = (state >> 1).to(tl.float32)
    return logits - frequency * count - tl.where(count > 0, presence, 0.0)


@triton.jit
def add_bias(logits, tokens, row, position, offsets_ptr, token_ids_ptr, values_ptr, until_ptr):
    """`logits`: [n] float32 of `tokens` [n]. Returns [n] float32."""
    for entry in range(tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)):
        value = tl.where(position < tl.load(until_ptr + entry), tl.load(values_ptr + entry), 0.0)
        logits += tl.where(tokens == tl.load(token_ids_ptr + entry), value, 0.0)
    return logits


@triton.jit
def _count_kernel(
    state_ptr, slots_ptr, token_ids_ptr, num_tokens, vocab_size, IS_PROMPT: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + index, mask=index < num_tokens, other=-1).to(tl.int64)
    token_ids = tl.load(token_ids_ptr + index, mask=index < num_tokens, other=0)
    state_ptrs = state_ptr + slots * vocab_size + token_ids
    if IS_PROMPT:
        tl.atomic_or(state_ptrs, tl.full([BLOCK], 1, tl.int32), mask=slots >= 0, sem="relaxed")
    else:
        tl.atomic_add(state_ptrs, tl.full([BLOCK], 2, tl.int32), mask=slots >= 0, sem="relaxed")


def count_prompt_(state: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Note tokens of prompts.

    Args:
        state: [P, V] int32, contiguous.
        slots: [T] int32, whose row of `state` each token is for; -1 for none.
        token_ids: [T] int64, below V.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    _count(state, slots, token_ids, is_prompt=True)


def count_completion_(state: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Note tokens of completions: what was just sampled, or what a resumed sequence has. As `count_prompt_`."""
    _count(state, slots, token_ids, is_prompt=False)


def _count(state: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor, *, is_prompt: bool) -> None:
    num_tokens, block = len(token_ids), 128
    _check_state(state, state.shape[-1])
    check_tensor("slots", slots, (num_tokens,), torch.int32)
    check_tensor("token_ids", token_ids, (num_tokens,), torch.int64)
    if num_tokens:
        grid = (triton.cdiv(num_tokens, block),)
        _count_kernel[grid](
            state, slots, token_ids, num_tokens, state.shape[1], IS_PROMPT=is_prompt, BLOCK=block, num_warps=4
        )


def _check_state(state: torch.Tensor, vocab_size: int) -> None:
    check_tensor("state", state, (len(state), vocab_size), torch.int32)
    if not state.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}, expected ({vocab_size}, 1)")
