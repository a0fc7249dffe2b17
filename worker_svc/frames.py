"""The rows of one engine step as one TokenFrame a gateway: columns instead of objects. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Final

from weft.columns import pack_f32, pack_u32
from weft.messages import FINISH_NONE, RowLogprobs, TokenFrame
from worker_svc.engine_io import TokenRow

# `TokenFrame.counts` has a byte for each row.
MAX_ROW_TOKENS: Final = 255


def to_frames(
    rows: Iterable[TokenRow], next_sequence: dict[str, int], *, worker: str, worker_epoch: int
) -> list[tuple[str, TokenFrame]]:
    """Turn rows into (gateway, frame) pairs, a gateway's rows in the order given.

    Args:
        next_sequence: the number of each gateway's next frame; one that is not there begins at 0.

    Mutates: `next_sequence`.
    """
    by_gateway: dict[str, list[TokenRow]] = {}
    for row in rows:
        by_gateway.setdefault(row.gateway, []).append(row)
    frames: list[tuple[str, TokenFrame]] = []
    for gateway, own in by_gateway.items():
        sequence = next_sequence.get(gateway, 0)
        next_sequence[gateway] = sequence + 1
        frames.append((gateway, _frame(own, worker, worker_epoch, sequence)))
    return frames


def _frame(rows: list[TokenRow], worker: str, worker_epoch: int, sequence: int) -> TokenFrame:
    counts = [len(row.token_ids) for row in rows]
    if max(counts) > MAX_ROW_TOKENS:
        rows = [piece for row in rows for piece in _split(row)]
        counts = [len(row.token_ids) for row in rows]
    return TokenFrame(
        worker=worker,
        worker_epoch=worker_epoch,
        sequence=sequence,
        slots=pack_u32([row.slot for row in rows]),
        epochs=pack_u32([row.epoch for row in rows]),
        first_indices=pack_u32([row.first_index for row in rows]),
        counts=bytes(counts),
        finishes=bytes([row.finish for row in rows]),
        token_ids=pack_u32(chain.from_iterable([row.token_ids for row in rows])),
        logprobs=[_logprobs(i, row) for i, row in enumerate(rows) if row.logprobs],
        errors={i: row.error for i, row in enumerate(rows) if row.error is not None},
    )


def _split(row: TokenRow) -> Sequence[TokenRow]:
    """Cut a row into rows that a byte can count; the last carries the finish."""
    if len(row.token_ids) <= MAX_ROW_TOKENS:
        return (row,)
    starts = range(0, len(row.token_ids), MAX_ROW_TOKENS)
    pieces = [
        replace(
            row,
            first_index=row.first_index + start,
            token_ids=row.token_ids[start : start + MAX_ROW_TOKENS],
            logprobs=row.logprobs[start : start + MAX_ROW_TOKENS],
            finish=FINISH_NONE,
            error=None,
        )
        for start in starts
    ]
    pieces[-1] = replace(pieces[-1], finish=row.finish, error=row.error)
    return pieces


def _logprobs(index: int, row: TokenRow) -> RowLogprobs:
    # All tokens of a row were asked for the same number of alternatives.
    return RowLogprobs(
        row=index,
        k=len(row.logprobs[0][1]),
        sampled=pack_f32([sampled for sampled, _, _ in row.logprobs]),
        top_token_ids=pack_u32(chain.from_iterable([token_ids for _, token_ids, _ in row.logprobs])),
        top_values=pack_f32(chain.from_iterable([values for _, _, values in row.logprobs])),
    )
