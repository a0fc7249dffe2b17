"""A step's columns in one buffer."""

from __future__ import annotations

import torch

from worker_svc.backends.device_step import DeviceStep, StepShape
from worker_svc.step_input import StepInput

CPU = torch.device("cpu")
STEP = StepInput(
    token_ids=[7, 8, 9, 4],
    positions=[30, 31, 32, 5],
    slot_mapping=[94, 95, 16, 37],
    query_lens=[3, 1],
    seq_lens=[33, 6],
    block_tables=[[3, 5, 1], [2]],
    logit_rows=[2, 3],
    pending=[(3, 1)],
)


def test_columns_arrive_as_they_were_with_the_pending_tokens_in() -> None:
    step = DeviceStep.of(STEP, torch.tensor([40, 41, 42]), CPU)
    batch = step.batch(STEP.logit_rows)
    assert batch.token_ids.tolist() == [7, 8, 9, 41]
    assert (batch.positions.tolist(), batch.slots.tolist()) == (STEP.positions, STEP.slot_mapping)
    assert batch.logit_rows is not None and batch.logit_rows.tolist() == [2, 3]
    attention = batch.attention
    assert attention.cu_seqlens_q.tolist() == [0, 3, 4] and attention.seq_lens.tolist() == [33, 6]
    assert attention.block_tables.tolist() == [[3, 5, 1], [2, 0, 0]]
    assert (attention.max_query_len, attention.max_seq_len) == (3, 48)


def test_what_pads_a_larger_buffer_is_written_nowhere_and_asks_for_nothing() -> None:
    step = DeviceStep.allocate(StepShape(6, 4, 8, 3), CPU)
    step.buffer.fill_(77)
    step.fill(STEP, torch.tensor([0, 0]))
    batch = step.batch(None)
    assert batch.logit_rows is None
    assert batch.slots.tolist() == [*STEP.slot_mapping, -1, -1]
    assert batch.token_ids[4:].tolist() == batch.positions[4:].tolist() == [0, 0]
    assert batch.attention.cu_seqlens_q.tolist() == [0, 3, 4, 4, 4]
    assert batch.attention.seq_lens.tolist() == [33, 6, 0, 0]
    assert batch.attention.block_tables[0].tolist() == [3, 5, 1, 0, 0, 0, 0, 0]
