"""One step as columns of tokens: what the engine gives a model to compute."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.hashing import BLOCK_SIZE
from worker_svc.batch import StepPlan
from worker_svc.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one step computes: some tokens of each of B sequences, T in all. Prefill and decode are not told apart."""

    token_ids: list[int]  # [T] the tokens this step computes, sequence after sequence
    positions: list[int]  # [T]
    slot_mapping: list[int]  # [T] block_id * BLOCK_SIZE + offset: where each token's K and V go
    query_lens: list[int]  # [B] tokens of each sequence in this step
    seq_lens: list[int]  # [B] its tokens after this step
    block_tables: list[list[int]]  # [B][blocks of the sequence, in order]
    logit_rows: list[int]  # rows of [T] whose logits are wanted
    # (row of [T], row among the tokens sampled last): tokens that are taken from there, on the device.
    pending: list[tuple[int, int]] = field(default_factory=list)


def make_step_input(plan: StepPlan) -> tuple[StepInput, list[Sequence]]:
    """The plan as the runner's columns, and the sequences of its `logit_rows`: those that have no token left."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    seq_lens: list[int] = []
    tables: list[list[int]] = []
    logit_rows: list[int] = []
    sampled: list[Sequence] = []
    pending: list[tuple[int, int]] = []
    for sequence, count in plan.num_scheduled_tokens.items():
        start, table = sequence.num_computed_tokens, sequence.block_table
        end = start + count
        if count == 1:
            token_ids.append(sequence.token_ids[start])
            positions.append(start)
            slots.append(table[start // BLOCK_SIZE] * BLOCK_SIZE + start % BLOCK_SIZE)
        else:
            token_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            slots += [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(start, end)]
        seq_lens.append(end)
        tables.append(table)
        if end > sequence.num_known_tokens:
            token_ids[-1] = 0
            pending.append((len(token_ids) - 1, sequence.pending_row))
        if end == len(sequence.token_ids):
            logit_rows.append(len(token_ids) - 1)
            sampled.append(sequence)
    query_lens = list(plan.num_scheduled_tokens.values())
    return StepInput(token_ids, positions, slots, query_lens, seq_lens, tables, logit_rows, pending), sampled
