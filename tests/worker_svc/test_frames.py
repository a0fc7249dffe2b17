"""Rows to columns: nothing lost, nothing reordered, frames numbered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import codec
from weft.columns import unpack_f32, unpack_u32
from weft.messages import FINISH_ERROR, FINISH_LENGTH, FINISH_NONE, ErrorInfo, TokenFrame
from worker_svc.engine_io import TokenRow
from worker_svc.frames import to_frames

u32 = st.integers(0, 2**32 - 1)
rows_strategy = st.lists(
    st.builds(
        TokenRow,
        request_id=st.just("r"),
        gateway=st.sampled_from(["g1", "g2"]),
        slot=u32,
        epoch=u32,
        first_index=st.integers(0, 10**6),
        token_ids=st.lists(u32, max_size=600).map(tuple),
        finish=st.integers(0, 3),
    ),
    max_size=12,
)


def frames_of(rows: list[TokenRow], numbers: dict[str, int] | None = None) -> dict[str, TokenFrame]:
    found = to_frames(rows, {} if numbers is None else numbers, worker="w1", worker_epoch=7)
    # As it arrives: every frame made here is one that the other side takes.
    return {gateway: codec.decode(codec.encode(frame), TokenFrame) for gateway, frame in found}


def read(frame: TokenFrame) -> list[tuple[int, int, int, tuple[int, ...], int]]:
    token_ids, found = unpack_u32(frame.token_ids), []
    numbers = map(unpack_u32, (frame.slots, frame.epochs, frame.first_indices))
    for slot, epoch, first_index, count, finish in zip(*numbers, frame.counts, frame.finishes, strict=True):
        found.append((slot, epoch, first_index, tuple(token_ids[:count]), finish))
        token_ids = token_ids[count:]
    return found


@settings(deadline=None)
@given(rows_strategy)
def test_every_token_of_every_row_arrives_in_order(rows: list[TokenRow]) -> None:
    for gateway, frame in frames_of(rows).items():
        own = [row for row in rows if row.gateway == gateway]
        tokens: list[tuple[int, int, int, int]] = []
        for slot, epoch, first_index, token_ids, _ in read(frame):
            tokens += [(slot, epoch, first_index + i, token_id) for i, token_id in enumerate(token_ids)]
        assert tokens == [
            (row.slot, row.epoch, row.first_index + i, token_id)
            for row in own
            for i, token_id in enumerate(row.token_ids)
        ]
        assert [f for *_, f in read(frame) if f] == [
            row.finish for row in rows if row.gateway == gateway and row.finish
        ]


def test_frames_of_each_gateway_are_numbered_on_their_own() -> None:
    numbers: dict[str, int] = {}
    one, two = (TokenRow("r", gateway, 0, 0, 0, (1,)) for gateway in ("g1", "g2"))
    assert {g: f.sequence for g, f in frames_of([one, two], numbers).items()} == {"g1": 0, "g2": 0}
    assert {g: f.sequence for g, f in frames_of([two], numbers).items()} == {"g2": 1}
    assert {g: f.sequence for g, f in frames_of([one, two], numbers).items()} == {"g1": 1, "g2": 2}


@pytest.mark.parametrize("count", [255, 256, 510, 511])
def test_a_row_too_long_for_a_byte_is_cut_and_its_last_piece_finishes(count: int) -> None:
    row = TokenRow("r", "g1", 3, 1, 100, tuple(range(count)), FINISH_LENGTH)
    pieces = read(frames_of([row])["g1"])
    assert [len(token_ids) for *_, token_ids, _ in pieces] == [255] * (count // 255) + [count % 255] * (count % 255 > 0)
    assert [finish for *_, finish in pieces] == [FINISH_NONE] * (len(pieces) - 1) + [FINISH_LENGTH]
    assert [first for _, _, first, _, _ in pieces] == [100 + 255 * i for i in range(len(pieces))]


def test_logprobs_keep_their_row_and_order() -> None:
    plain = TokenRow("r", "g1", 0, 0, 0, (1,))
    asked = TokenRow("r", "g1", 1, 0, 0, (4, 5), logprobs=((-0.5, (4, 9), (-0.5, -1.0)), (-2.0, (8, 5), (-0.25, -2.0))))
    (entry,) = frames_of([plain, asked])["g1"].logprobs
    assert (entry.row, entry.k) == (1, 2)
    assert unpack_f32(entry.sampled) == [-0.5, -2.0]
    assert unpack_u32(entry.top_token_ids) == [4, 9, 8, 5]
    assert unpack_f32(entry.top_values) == [-0.5, -1.0, -0.25, -2.0]


def test_a_failed_row_carries_its_error() -> None:
    error = ErrorInfo("internal_error", "this sequence failed")
    rows = [TokenRow("r", "g1", 0, 0, 0, (1,)), TokenRow("r", "g1", 1, 0, 5, (), FINISH_ERROR, error=error)]
    frame = frames_of(rows)["g1"]
    assert frame.errors == {1: error}
    assert list(frame.counts) == [1, 0]
