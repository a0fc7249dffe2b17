"""How news of sequences become rows for their gateways."""

from __future__ import annotations

from tests.support.engine_requests import make_request, make_sequence
from weft.errors import InvalidRequest
from weft.messages import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, BlockHash, ErrorInfo
from worker_svc.engine_io import LoadWanted, StepOutput
from worker_svc.outbox import Outbox
from worker_svc.speculation.speculation import Emitted

HASH = BlockHash(b"h" * 16)


def output_of(box: Outbox) -> StepOutput:
    output = box.output((), (), ())
    assert output is not None
    return output


def test_box_without_news_has_no_output() -> None:
    assert Outbox().output((), (), ()) is None


def test_news_of_blocks_alone_are_news() -> None:
    for output in (
        Outbox().output((HASH,), (), ()),
        Outbox().output((), (HASH,), ()),
        Outbox().output((), (), ((HASH, b""),)),
    ):
        assert output is not None and not output.rows


def test_tokens_are_numbered_from_the_end_of_the_prompt() -> None:
    box, sequence = Outbox(), make_sequence([5, 6, 7], emitted=[8, 9])
    logprobs = (-0.5, (8,), (-0.5,))
    box.emitted(Emitted(sequence, 3, 1, [8, 9]), (logprobs,), FINISH_STOP)
    (row,) = output_of(box).rows
    assert (row.first_index, row.token_ids, row.finish, row.logprobs) == (0, (8, 9), FINISH_STOP, (logprobs,))


def test_end_without_a_token_says_where_the_next_would_have_been() -> None:
    box, sequence = Outbox(), make_sequence([5, 6, 7], emitted=[8, 9])
    box.finished(sequence, 5, FINISH_LENGTH)
    (row,) = output_of(box).rows
    assert (row.first_index, row.token_ids, row.finish, row.error) == (2, (), FINISH_LENGTH, None)


def test_every_choice_of_a_refused_request_fails_where_its_stream_stands() -> None:
    box, error = Outbox(), ErrorInfo.of(InvalidRequest("no"))
    box.refused(make_request([5], emitted=[(), (8, 9)], slots=[3, 4]), error)
    output = output_of(box)
    assert [(row.slot, row.first_index, row.finish) for row in output.rows] == [
        (3, 0, FINISH_ERROR),
        (4, 2, FINISH_ERROR),
    ]
    assert {row.error for row in output.rows} == {error}
    assert output.ended == (("r0", 0),)


def test_all_kinds_of_news_come_in_their_own_columns() -> None:
    box, sequence = Outbox(), make_sequence([5, 6, 7])
    sequence.num_chunks = 2
    box.waits(LoadWanted("r1", 0, (HASH,)))
    box.started(sequence.request, 3, 2, 9.0)
    box.progressed(sequence, "prefill", 3)
    box.ended(sequence.request)
    output = output_of(box)
    assert [load.request_id for load in output.load] == ["r1"]
    assert [(one.num_prompt_tokens, one.num_cached_tokens, one.at) for one in output.started] == [(3, 2, 9.0)]
    assert [(one.kind, one.num_chunks, one.num_computed_tokens) for one in output.progress] == [("prefill", 2, 3)]
    assert output.ended == (("r0", 0),)
