"""From logits to tokens on the device, by the rules of `worker_svc.sampler`: the same noise, and so the same tokens.

For each of B rows of logits [V], in float32:

    1. repetition, frequency and presence penalties, by what the row has seen
    2. logit bias is added; stop tokens are -inf until `min_tokens`
    3. temperature 0: argmax. Otherwise z = logits / temperature, and top_k, top_p and min_p keep some tokens
    4. argmax(z + g) over those kept, g Gumbel noise from (seed, position, token id); of equals the lowest token id

Two kernels, whatever the parameters: the first cuts the vocabulary into splits, so that one row fills a GPU, and gives
the best token of each; the second takes the best of the row, and if it is not kept, looks further (`top_k_top_p`).
Nothing is sorted. A row's result does not depend on the rows beside it. Tokens differ from the torch sampler's only
where two candidates are as near to each other as the rounding of logarithms.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final

import torch
import triton
import triton.language as tl

from worker_svc.kernels.noise import CHOICE, gumbel, random_bits
from worker_svc.kernels.penalties import (
    Bias,
    Penalties,
    add_bias,
    add_bias_reference,
    penalize,
    penalize_reference,
)
from worker_svc.kernels.top_k_top_p import Filters, filter_reference, first_kept, group_size, load_filters
from worker_svc.kernels.tuning import Config, choose
from worker_svc.kernels.varlen import check_tensor
from worker_svc.noise import full_noise

# A vocabulary of 128256 has 126 splits, one for each multiprocessor of an H100 at batch 1. The same at any batch, since
# sums are rounded as the splits have them. The groups of `top_k_top_p` have 64 tokens, or more where the vocabulary is
# very large; what may be kept is scanned 8 tokens a thread.
DEFAULT: Final = Config({"BLOCK": 1024, "GROUP": 64, "SCAN": 4096}, num_warps=4)
CHOOSE_WARPS: Final = 4
FILTER_WARPS: Final = 16


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None = None,
    penalties: Penalties | None = None,
    bias: Bias | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` in plain torch, with a sort."""
    is_bad = ~logits.isfinite().all(dim=1)
    values = logits.float().masked_fill(is_bad[:, None], 0.0)
    if penalties is not None:
        values = penalize_reference(values, penalties)
    if bias is not None:
        values = add_bias_reference(values, bias, positions)
    is_greedy = (temperature == 0)[:, None]
    scaled = values / torch.where(is_greedy, 1.0, temperature[:, None])
    key = (seeds[:, None] & 0xFFFFFFFF, seeds[:, None] >> 32 & 0xFFFFFFFF)
    kept = scaled if filters is None else filter_reference(scaled, filters)
    scores = torch.where(is_greedy, scaled, kept + full_noise(key, positions[:, None], logits.shape[1]))
    token_ids = (scores == scores.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    return token_ids.masked_fill(is_bad, 0), is_bad


@triton.jit
def _score_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,  # None for no filters, with all down to split_sum_ptr
    top_p_ptr,
    min_p_ptr,
    scaled_ptr,
    group_max_ptr,
    active_ptr,
    split_max_ptr,
    split_sum_ptr,
    penalty_slots_ptr,  # None for no penalties, with all down to presence_ptr
    penalty_state_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    bias_offsets_ptr,  # None for no bias, with all down to bias_until_ptr
    bias_token_ids_ptr,
    bias_values_ptr,
    bias_until_ptr,
    best_scores_ptr,
    best_tokens_ptr,
    vocab_size,
    logits_stride,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One split of one row: its best token, NaN for its score if a logit is not finite, and what `first_kept` needs."""
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0)
    partial = row * tl.num_programs(0) + split
    tokens = split * BLOCK + tl.arange(0, BLOCK)
    is_token = tokens < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=is_token, other=0.0).to(tl.float32)
    is_finite = tl.abs(logits) < float("inf")
    logits = tl.where(is_finite, logits, 0.0)
    temperature = tl.load(temperature_ptr + row)
    position = tl.load(positions_ptr + row)
    if penalty_slots_ptr is not None:
        slot = tl.load(penalty_slots_ptr + row).to(tl.int64)
        if slot >= 0:
            state = tl.load(penalty_state_ptr + slot * vocab_size + tokens, mask=is_token, other=0)
            repetition, frequency = tl.load(repetition_ptr + row), tl.load(frequency_ptr + row)
            logits = penalize(logits, state, repetition, frequency, tl.load(presence_ptr + row))
    if bias_offsets_ptr is not None:
        logits = add_bias(
            logits, tokens, row, position, bias_offsets_ptr, bias_token_ids_ptr, bias_values_ptr, bias_until_ptr
        )

    scaled = tl.where(is_token, logits, float("-inf"))
    scores = scaled
    if temperature > 0.0:
        scaled = tl.div_rn(scaled, tl.zeros_like(scaled) + temperature)
        quads = split * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        scores = scaled + gumbel(random_bits(tl.load(seeds_ptr + row), quads, position, CHOICE))
    best, place = tl.max(scores, axis=0, return_indices=True)
    num_bad = tl.sum((~is_finite).to(tl.int32), axis=0)
    tl.store(best_scores_ptr + partial, tl.where(num_bad > 0, float("nan"), best))
    tl.store(best_tokens_ptr + partial, split * BLOCK + place)
    if top_k_ptr is not None:
        _, _, _, is_filtered = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
        if is_filtered & (temperature > 0.0):
            largest = tl.max(scaled, axis=0)
            # All may be -inf, and -inf - -inf is not a number.
            base = tl.where(largest == float("-inf"), 0.0, largest)
            tl.store(split_max_ptr + partial, largest)
            tl.store(split_sum_ptr + partial, tl.sum(tl.exp(scaled - base), axis=0))
            tl.store(scaled_ptr + partial * BLOCK + tl.arange(0, BLOCK), scaled)
            group_max = tl.max(tl.reshape(scaled, (BLOCK // GROUP, GROUP)), axis=1)
            tl.store(group_max_ptr + partial * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), group_max)


@triton.jit
def _choose_kernel(
    best_scores_ptr,
    best_tokens_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,  # None for no filters, with all down to split_sum_ptr
    top_p_ptr,
    min_p_ptr,
    scaled_ptr,
    group_max_ptr,
    active_ptr,
    split_max_ptr,
    split_sum_ptr,
    token_ids_ptr,
    is_bad_ptr,
    vocab_size,
    num_splits,
    num_groups,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_SPLITS)
    first = row * num_splits
    scores = tl.load(best_scores_ptr + first + splits, mask=splits < num_splits, other=float("-inf"))
    num_bad = tl.sum((scores != scores).to(tl.int32), axis=0)
    _, place = tl.max(tl.where(scores == scores, scores, float("-inf")), axis=0, return_indices=True)
    token = tl.load(best_tokens_ptr + first + place)
    if top_k_ptr is not None:
        top_k, top_p, min_p, is_filtered = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
        if is_filtered & (tl.load(temperature_ptr + row) > 0.0) & (num_bad == 0):
            first_group = row * num_groups
            token = first_kept(
                token,
                tl.load(seeds_ptr + row),
                tl.load(positions_ptr + row),
                top_k,
                top_p,
                min_p,
                scaled_ptr + first_group * GROUP,
                group_max_ptr + first_group,
                active_ptr + first_group,
                split_max_ptr + first,
                split_sum_ptr + first,
                vocab_size,
                num_groups,
                num_splits,
                BLOCK_GROUPS,
                BLOCK_SPLITS,
                GROUP,
                SCAN,
            )
    tl.store(token_ids_ptr + row, tl.where(num_bad > 0, 0, token).to(tl.int64))
    tl.store(is_bad_ptr + row, num_bad > 0)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None = None,
    penalties: Penalties | None = None,
    bias: Bias | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token for each row. Nothing waits for the device, and the launches depend on shapes only.

    Args:
        logits: [B, V] of any float type; rows may be strided.
        temperature: [B] float32; 0 for greedy rows, whose filters do not matter.
        seeds: [B] int64, of which the 64 bits count (`noise.seeds_tensor`).
        positions: [B] int64, index in the completion of the token to sample.
        filters, penalties, bias: None if no row has any, which saves the work of asking.
        config: None for the one that `tuning` has.

    Returns:
        Token ids [B] int64, and [B] bool whether any logit of the row is not finite; then the token id is 0.

    Raises:
        ValueError: names the tensor that has another shape, type or stride.
    """
    _check(logits, temperature, seeds, positions, filters, penalties, bias)
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_bad = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows == 0:
        return token_ids, is_bad
    config = config or choose("sample", "", DEFAULT, logits.device)
    block = config.blocks["BLOCK"]
    num_splits = triton.cdiv(vocab_size, block)

    best_scores = torch.empty((num_rows, num_splits), dtype=torch.float32, device=logits.device)
    best_tokens = torch.empty_like(best_scores, dtype=torch.int32)
    group = min(group_size(vocab_size, config.blocks["GROUP"]), block)
    num_groups = num_splits * block // group
    filter_columns = _filter_columns(filters, num_rows, num_splits, num_groups, num_splits * block)
    _score_kernel[(num_splits, num_rows)](
        logits,
        temperature,
        seeds,
        positions,
        *filter_columns,
        *_columns(penalties, Penalties),
        *_columns(bias, Bias),
        best_scores,
        best_tokens,
        vocab_size,
        logits.stride(0),
        BLOCK=block,
        GROUP=group,
        num_warps=config.num_warps,
    )
    _choose_kernel[(num_rows,)](
        best_scores,
        best_tokens,
        temperature,
        seeds,
        positions,
        *filter_columns,
        token_ids,
        is_bad,
        vocab_size,
        num_splits,
        num_groups,
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        BLOCK_GROUPS=triton.next_power_of_2(num_groups),
        GROUP=group,
        SCAN=config.blocks["SCAN"],
        num_warps=CHOOSE_WARPS if filters is None else FILTER_WARPS,
    )
    return token_ids, is_bad


def _columns(parameters: Penalties | Bias | None, kind: type[Penalties] | type[Bias]) -> list[torch.Tensor | None]:
    """The tensors in order, or as many None."""
    return [None if parameters is None else getattr(parameters, field.name) for field in fields(kind)]


def _filter_columns(
    filters: Filters | None, num_rows: int, num_splits: int, num_groups: int, num_tokens: int
) -> tuple[torch.Tensor | None, ...]:
    """Parameters, and memory for what the first kernel leaves to the second."""
    if filters is None:
        return (None,) * 8

    def scratch(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty((num_rows, size), dtype=dtype, device=filters.top_k.device)

    return (
        filters.top_k,
        filters.top_p,
        filters.min_p,
        scratch(num_tokens),
        scratch(num_groups),
        scratch(num_groups, torch.int32),
        scratch(num_splits),
        scratch(num_splits),
    )


def _check(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    filters: Filters | None,
    penalties: Penalties | None,
    bias: Bias | None,
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits has shape {tuple(logits.shape)}, {logits.dtype}, expected [B, V] of a float type")
    num_rows, vocab_size = logits.shape
    check_tensor("logits", logits, (num_rows, vocab_size))
    check_tensor("temperature", temperature, (num_rows,), torch.float32)
    check_tensor("seeds", seeds, (num_rows,), torch.int64)
    check_tensor("positions", positions, (num_rows,), torch.int64)
    if filters is not None:
        filters.check(num_rows)
    if penalties is not None:
        penalties.check(num_rows, vocab_size)
    if bias is not None:
        bias.check(num_rows)
