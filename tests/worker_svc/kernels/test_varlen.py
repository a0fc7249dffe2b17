"""How a step is dealt to programs: the grid from shapes, the work from lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.gpu.attention_steps import random_batch
from weft.hashing import BLOCK_SIZE
from worker_svc.kernels.varlen import VarlenBatch, deal, plan_launch, step_kind

CPU = torch.device("cpu")
# Queries of a sequence, none to pad a batch, and the tokens before them.
LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30_000)), min_size=1, max_size=40)


def batch_of(query_lens: list[int], seq_lens: list[int]) -> VarlenBatch:
    """A batch whose tables are of no use."""
    tables = torch.zeros(len(seq_lens), -(-max(seq_lens) // BLOCK_SIZE), dtype=torch.int32)
    starts = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return VarlenBatch(starts, lens, tables, max(1, *query_lens), max(seq_lens))


@triton.jit
def _deal_kernel(
    cu_seqlens_ptr, seq_lens_ptr, num_sequences, units_ptr, splits_ptr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, NUM_EXTRA: tl.constexpr,
    MIN_SHARE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    _, units, splits = deal(
        cu_seqlens_ptr, seq_lens_ptr, num_sequences, WINDOW, BLOCK_N, BLOCK_Q, NUM_EXTRA, MIN_SHARE, BLOCK_B
    )
    tl.store(units_ptr + tl.arange(0, BLOCK_B), units)
    tl.store(splits_ptr + tl.arange(0, BLOCK_B), splits)


def dealt(batch: VarlenBatch, block_q: int, num_extra: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Units of each sequence, and splits of each of its units; tiles have 64 keys."""
    units, splits = torch.zeros(2, 128, dtype=torch.int32)
    _deal_kernel[(1,)](
        batch.cu_seqlens_q, batch.seq_lens, len(batch.seq_lens), units, splits,
        WINDOW=window, BLOCK_N=64, BLOCK_Q=block_q, NUM_EXTRA=num_extra, MIN_SHARE=256, BLOCK_B=128,
    )  # fmt: skip
    return units, splits


@given(LENGTHS, st.sampled_from([16, 64, 128]), st.sampled_from([(1, 1), (4, 1), (7, 1), (80, 2)]), st.integers(1, 99))
@settings(max_examples=60, deadline=None)
def test_every_unit_and_split_has_a_program(
    lens: list[tuple[int, int]], block_m: int, heads: tuple[int, int], num_extra: int
) -> None:
    query_lens, seq_lens = [queries for queries, _ in lens], [queries + before or 1 for queries, before in lens]
    batch = batch_of(query_lens, seq_lens)
    launch = plan_launch(batch, sum(query_lens), *heads, block_m, None)
    units, splits = dealt(batch, launch.block_q, num_extra, None)
    assert units.tolist()[: len(lens)] == [-(-queries // launch.block_q) for queries in query_lens]
    assert units[len(lens) :].sum() == 0 and int(units.sum()) <= launch.num_units
    assert int((units * splits).sum()) <= launch.num_units + num_extra
    assert launch.block_q * launch.tile_heads <= block_m


@pytest.mark.parametrize(("window", "expected"), [(None, [1, 9, 3, 0]), (1000, [1, 4, 4, 0])], ids=str)
def test_long_sequences_are_split_and_short_ones_are_not(window: int | None, expected: list[int]) -> None:
    batch = batch_of([1, 1, 1, 0], [100, 9000, 3000, 30000])
    units, splits = dealt(batch, 4, 12, window)
    assert (units * splits).tolist()[:4] == expected


def test_launch_depends_on_shapes_only() -> None:
    batch = batch_of([1, 1, 1], [900, 30, 2])
    other = dataclasses.replace(batch, cu_seqlens_q=batch.cu_seqlens_q * 0, seq_lens=batch.seq_lens * 0)
    assert plan_launch(batch, 3, 4, 2, 16, None) == plan_launch(other, 3, 4, 2, 16, None)


@pytest.mark.parametrize(
    ("lengths", "block_m", "window", "is_split"),
    [
        (([1], [511]), 16, None, False),
        (([1], [512]), 16, None, True),
        (([1], [9000]), 16, 300, False),
        (([1] * 7, [9000] * 7), 16, None, True),
        (([1] * 8, [9000] * 8), 16, None, False),
        (([9], [9000]), 128, None, True),
        (([9, 9], [9000] * 2), 128, None, False),
    ],
    ids=str,
)
def test_steps_that_fill_the_device_or_are_short_are_not_split(
    lengths: tuple[list[int], list[int]], block_m: int, window: int | None, is_split: bool
) -> None:
    batch = batch_of(*lengths)
    assert (plan_launch(batch, sum(lengths[0]), 1, 1, block_m, window).num_extra > 0) == is_split


@pytest.mark.parametrize(
    ("query_lens", "group", "kind"),
    [([1] * 9, 4, "decode"), ([4, 4], 4, "decode"), ([5, 5], 4, "mixed"), ([1] * 9 + [64], 4, "mixed"),
     ([1, 999], 4, "prefill"), ([1], 32, "mixed"), ([1], 128, "prefill")],
    ids=str,
)  # fmt: skip
def test_kind_of_a_step(query_lens: list[int], group: int, kind: str) -> None:
    assert step_kind(batch_of(query_lens, [1000] * len(query_lens)), sum(query_lens), group) == kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": torch.ones(3, dtype=torch.int32)}, r"cu_seqlens_q has shape \(3,\), expected \(4,\)"),
        ({"seq_lens": torch.ones(2, dtype=torch.int64)}, "seq_lens is torch.int64, expected torch.int32"),
        ({"block_tables": torch.ones(3, 4, dtype=torch.int32)}, r"block_tables has shape \(3, 4\), expected \(2, 4\)"),
        ({"max_seq_len": 500}, "max_seq_len is 500, and block_tables has 2 blocks"),
        ({"max_query_len": 0}, "max_query_len is 0, expected 1 to max_seq_len, 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    batch = random_batch(CPU, ([1, 1], [3, 4]))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(batch, **changes)
