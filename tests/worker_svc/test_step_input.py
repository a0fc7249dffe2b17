"""Which rows of a step make a step of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from worker_svc.step_input import StepInput

STEP = StepInput(
    token_ids=[10, 11, 12, 20, 30, 31, 32],
    positions=[4, 5, 6, 9, 0, 1, 2],
    slot_mapping=[100, 101, 102, 200, 300, 301, 302],
    query_lens=[3, 1, 3],
    seq_lens=[7, 10, 3],
    block_tables=[[6], [12], [18]],
    logit_rows=[],
    pending=[(3, 0)],
)


def test_last_rows_are_the_ends_of_their_sequences() -> None:
    assert replace(STEP, logit_rows=[1, 2, 3, 6]).ends() == StepInput(
        token_ids=[11, 12, 20, 32],
        positions=[5, 6, 9, 2],
        slot_mapping=[101, 102, 200, 302],
        query_lens=[2, 1, 1],
        seq_lens=[7, 10, 3],
        block_tables=[[6], [12], [18]],
        logit_rows=[0, 1, 2, 3],
    )


def test_sequences_without_wanted_rows_are_left_out() -> None:
    ends = replace(STEP, logit_rows=[3]).ends()
    assert ends is not None
    assert (ends.token_ids, ends.query_lens, ends.seq_lens, ends.block_tables) == ([20], [1], [10], [[12]])


@pytest.mark.parametrize(
    "rows",
    [[], list(range(7)), [0], [1, 3], [0, 2], [6, 3], [3, 2], [2, 2], [4, 5, 6, 3]],
    ids=str,
)
def test_other_rows_have_none(rows: list[int]) -> None:
    assert replace(STEP, logit_rows=rows).ends() is None
