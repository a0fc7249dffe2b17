import queue
import time

import pytest

from tests.support.engine_requests import make_folder, make_request, make_settings
from weft.messages import FINISH_ERROR, FINISH_LENGTH, FINISH_NONE, FINISH_YIELD, SamplingParams
from worker_svc.engine_io import Add, Drop, StepOutput
from worker_svc.null_engine import DEFAULT_MAX_TOKENS, MAX_ROW_TOKENS, NullCore, NullEngine

FOLDER = make_folder(vocab_size=100, max_model_len=512, eos=(30,))


def core(**settings: object) -> NullCore:
    return NullCore(FOLDER, make_settings(engine="null", **settings))


def sampling(max_tokens: int | None = 8, **changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **changes)


def run(engine: NullCore, *commands: object, start: float = 100.0, seconds: float = 100.0) -> list[StepOutput]:
    outputs = [engine.step(commands, start)]
    while (due := engine.next_due) is not None and due < start + seconds:
        outputs.append(engine.step((), due + 1e-9))
    return [output for output in outputs if output is not None]


def tokens(outputs: list[StepOutput], slot: int = 0) -> list[int]:
    rows = [row for output in outputs for row in output.rows if row.slot == slot]
    assert [row.first_index for row in rows[1:]] == [row.first_index + len(row.token_ids) for row in rows[:-1]]
    return [token for row in rows for token in row.token_ids]


def test_first_token_comes_at_once_and_the_rest_at_the_given_pace() -> None:
    engine = core(null_tokens_per_s=50.0)
    first = engine.step([Add(make_request([1] * 5, sampling=sampling(3)))], 100.0)
    assert first is not None and len(first.rows) == 1 and first.started[0].num_prompt_tokens == 5
    assert engine.step((), 100.019) is None
    second = engine.step((), 100.0201)
    assert second is not None and second.rows[0].first_index == 1
    third = engine.step((), 100.0401)
    assert third is not None and third.rows[0].finish == FINISH_LENGTH and third.ended == (("r0", 0),)
    assert engine.load.is_idle and engine.load.num_free_blocks == engine.load.num_blocks


def test_first_token_waits_as_long_as_asked() -> None:
    engine = core(null_first_token_s=0.5)
    output = engine.step([Add(make_request([1], sampling=sampling()))], 100.0)
    assert output is not None and output.rows == ()
    assert engine.next_due == pytest.approx(100.5, abs=0.006)


def test_resumed_stream_continues_the_same_tokens() -> None:
    whole = tokens(run(core(), Add(make_request([1], sampling=sampling(20), seeds=[7]))))
    rest = run(core(), Add(make_request([1], sampling=sampling(20), seeds=[7], emitted=[whole[:9]], epoch=1)))
    assert rest[0].rows[0].first_index == 9
    assert whole[:9] + tokens(rest) == whole
    assert 30 not in whole and len(whole) == 20


def test_streams_that_are_due_together_share_an_output() -> None:
    engine = core()
    adds = [Add(make_request([1], request_id=f"r{i}", slots=[i], sampling=sampling())) for i in range(50)]
    assert all(len(output.rows) == 50 for output in run(engine, *adds))


def test_stalled_thread_catches_up_within_the_bounds_of_a_row() -> None:
    engine = core(null_tokens_per_s=1000.0)
    engine.step([Add(make_request([1], sampling=sampling(500)))], 100.0)
    late = engine.step((), 100.4)
    assert late is not None and len(late.rows[0].token_ids) == MAX_ROW_TOKENS


def test_dropped_streams_stop_and_free_their_room() -> None:
    engine = core()
    engine.step([Add(make_request([1] * 40, emitted=[(), (), ()], sampling=sampling(200)))], 100.0)
    held = engine.load.num_free_blocks
    one = engine.step([Drop("r0", 0, (1,))], 100.1)
    assert one is not None and {row.slot for row in one.rows} == {0, 2} and one.ended == ()
    assert engine.load.num_free_blocks > held
    rest = engine.step([Drop("r0", 0)], 100.2)
    assert rest is not None and rest.rows == () and rest.ended == (("r0", 0),)
    assert engine.load.num_free_blocks == engine.load.num_blocks and engine.load.num_running == 0


def test_higher_epoch_replaces_a_lower_one_and_a_lower_one_is_ignored() -> None:
    engine = core()
    engine.step([Add(make_request([1], epoch=2, sampling=sampling()))], 100.0)
    assert engine.step([Add(make_request([1], epoch=1, sampling=sampling()))], 100.001) is None
    output = engine.step([Add(make_request([1], epoch=3, sampling=sampling()))], 100.002)
    assert output is not None and output.ended == (("r0", 2),) and output.rows[0].epoch == 3


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, DEFAULT_MAX_TOKENS), (0, 0), (1, 1)])
def test_stream_ends_at_max_tokens(max_tokens: int | None, expected: int) -> None:
    outputs = run(core(), Add(make_request([1], sampling=sampling(max_tokens))))
    assert len(tokens(outputs)) == expected
    assert [row.finish for output in outputs for row in output.rows][-1] == FINISH_LENGTH


def test_prompt_that_fills_the_context_fails_alone() -> None:
    outputs = run(core(), Add(make_request([1] * 512, sampling=sampling())))
    assert outputs[0].rows[0].finish == FINISH_ERROR and outputs[0].rows[0].error is not None


@pytest.mark.parametrize("emitted", [0, 1, 7])
@pytest.mark.parametrize("stop_after", [1, 5, 12])
def test_stream_is_handed_back_after_exactly_so_many_new_tokens(stop_after: int, emitted: int) -> None:
    whole = tokens(run(core(), Add(make_request([1], sampling=sampling(20)))))
    engine = core(null_tokens_per_s=1000.0)
    outputs = run(engine, Add(make_request([1], sampling=sampling(20), emitted=[whole[:emitted]], epoch=1), stop_after))
    assert tokens(outputs) == whole[emitted : emitted + stop_after]
    finishes = [row.finish for output in outputs for row in output.rows]
    assert finishes[-1] == FINISH_YIELD and set(finishes[:-1]) <= {FINISH_NONE}
    assert outputs[-1].ended == (("r0", 1),)
    assert engine.load.is_idle and engine.load.num_free_blocks == engine.load.num_blocks


def test_stream_that_is_at_its_end_is_not_handed_back() -> None:
    outputs = run(core(), Add(make_request([1], sampling=sampling(8), emitted=[(), [3] * 4]), 4))
    rows = [row for output in outputs for row in output.rows if row.finish]
    assert {row.slot: row.finish for row in rows} == {0: FINISH_YIELD, 1: FINISH_LENGTH}
    assert [len(tokens(outputs, slot)) for slot in (0, 1)] == [4, 4]


def test_logprobs_are_given_when_asked_for() -> None:
    outputs = run(core(), Add(make_request([1], sampling=sampling(2, logprobs=3))))
    assert [len(row.logprobs) for output in outputs for row in output.rows] == [1, 1]
    assert len(outputs[0].rows[0].logprobs[0][1]) == 3


def test_thread_keeps_the_pace_of_many_streams() -> None:
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    engine = NullEngine(FOLDER, make_settings(engine="null", null_tokens_per_s=100.0))
    engine.start(outputs.put)
    began = time.monotonic()
    for i in range(500):
        engine.submit(Add(make_request([1], request_id=f"r{i}", slots=[i], sampling=sampling(20))))
    ended, received = 0, 0
    while ended < 500:
        output = outputs.get(timeout=10)
        ended += len(output.ended)
        received += sum(len(row.token_ids) for row in output.rows)
    engine.stop()
    assert received == 500 * 20
    assert time.monotonic() - began >= 0.19
    assert engine.load.failure is None


def test_failure_of_the_thread_is_kept_for_the_service() -> None:
    failed = queue.SimpleQueue[bool]()

    def on_output(output: StepOutput) -> None:
        failed.put(True)
        raise RuntimeError("loop is closed")

    engine = NullEngine(FOLDER, make_settings(engine="null"))
    engine.start(on_output)
    engine.submit(Add(make_request([1], sampling=sampling())))
    failed.get(timeout=10)
    engine.stop()
    assert isinstance(engine.load.failure, RuntimeError)
