"""One step as columns of tokens: what the engine gives a model to compute."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

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

    def ends(self) -> StepInput | None:
        """The wanted rows as a step of their own.

        None: all rows are wanted or none, or they are not, in their order, the last ones of their sequences.
        """
        if not 0 < len(self.logit_rows) < len(self.token_ids):
            return None
        stops = list(accumulate(self.query_lens))
        # If the rows are in order, so many of each sequence.
        places = [0, *(bisect_left(self.logit_rows, stop) for stop in stops)]
        counts = [end - begin for begin, end in pairwise(places)]
        rows = [row for stop, count in zip(stops, counts, strict=True) for row in range(stop - count, stop)]
        if rows != self.logit_rows:
            return None
        kept = [i for i, count in enumerate(counts) if count]
        return StepInput(
            token_ids=[self.token_ids[row] for row in rows],
            positions=[self.positions[row] for row in rows],
            slot_mapping=[self.slot_mapping[row] for row in rows],
            query_lens=[counts[i] for i in kept],
            seq_lens=[self.seq_lens[i] for i in kept],
            block_tables=[self.block_tables[i] for i in kept],
            logit_rows=list(range(len(rows))),
        )


def make_step_input(
    plan: StepPlan, drafts: Mapping[Sequence, Ordered[int]] | None = None
) -> tuple[StepInput, list[Sequence]]:
    """The plan as the runner's columns, and the sequences that have no token left, in the order of `logit_rows`.

    Args:
        drafts: tokens to compute after the last one of some of these sequences, which must be known. Each gives a row
            of logits of its own after that of the sequence.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_lens: list[int] = []
    seq_lens: list[int] = []
    tables: list[list[int]] = []
    logit_rows: list[int] = []
    sampled: list[Sequence] = []
    pending: list[tuple[int, int]] = []
    for sequence, count in plan.num_scheduled_tokens.items():
        start, table = sequence.num_computed_tokens, sequence.block_table
        end = start + count
        draft = drafts.get(sequence, ()) if drafts else ()
        if count == 1 and not draft:
            token_ids.append(sequence.token_ids[start])
            positions.append(start)
            slots.append(table[start // BLOCK_SIZE] * BLOCK_SIZE + start % BLOCK_SIZE)
        else:
            token_ids += sequence.token_ids[start:end]
            token_ids += draft
            positions += range(start, end + len(draft))
            slots += [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(start, end + len(draft))]
        query_lens.append(count + len(draft))
        seq_lens.append(end + len(draft))
        tables.append(table)
        if end > sequence.num_known_tokens:
            token_ids[-1] = 0
            pending.append((len(token_ids) - 1, sequence.pending_row))
        if end == len(sequence.token_ids):
            logit_rows += range(len(token_ids) - 1 - len(draft), len(token_ids))
            sampled.append(sequence)
    return StepInput(token_ids, positions, slots, query_lens, seq_lens, tables, logit_rows, pending), sampled
