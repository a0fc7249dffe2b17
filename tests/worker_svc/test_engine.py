import math
import queue
import random
from pathlib import Path

import msgspec
import pytest

from tests.support.engine_requests import DIGEST, make_folder, make_request, make_settings
from tests.support.engine_runs import Record, run, step
from tests.support.token_runner import NOTHING, TokenRunner
from weft import model_folder
from weft.columns import pack_u32
from weft.errors import InvalidRequest
from weft.hashing import block_hashes, chain_root
from weft.messages import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, SamplingParams
from weft.settings import WorkerSettings, load
from worker_svc.batch import Work
from worker_svc.engine import Engine
from worker_svc.engine_io import Add, BlocksLoaded, BlocksOffloaded, Drop, LoadWanted, Progress, StepOutput
from worker_svc.step_log import read_steps
from worker_svc.torch_engine import TorchEngine

EOS = 2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


DEFAULTS: dict[str, bool] = {}


@pytest.fixture(params=[False, True], ids=["in step", "overlapped"], autouse=True)
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Everything here holds whether or not a step stays in flight while the next is planned."""
    monkeypatch.setitem(DEFAULTS, "overlaps", request.param)
    return bool(request.param)


def make_engine(runner: TokenRunner | None = None, **settings: object) -> tuple[Engine, TokenRunner]:
    runner = runner or TokenRunner()
    chosen = make_settings(**{"max_num_batched_tokens": 64, "kv_offload": "always", **settings})
    return Engine(runner, chosen, digest=DIGEST, eos_token_ids=(EOS,), clock=Clock(), **DEFAULTS), runner


def greedy(max_tokens: int | None = 8, **changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **changes})


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, 60) for i in range(length)]


def add(prompt: list[int], request_id: str = "r0", **changes: object) -> Add:
    return Add(make_request(prompt, request_id=request_id, **{"sampling": greedy(), **changes}))


# ---- the same tokens, however they are computed ----


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_greedy_tokens_are_the_models_own(length: int) -> None:
    engine, runner = make_engine()
    record = run(engine, [add(prompt_of(length))])
    assert record.tokens() == runner.greedy(prompt_of(length), 8)
    assert record.outcomes["r0", 0].finish == FINISH_LENGTH and record.ended == [("r0", 0)]
    assert engine.pool.num_free_blocks == runner.num_blocks


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 512},
        {"max_num_seqs": 2},
        {"prefix_cache": False},
        {"batching": "static"},
    ],
    ids=str,
)
def test_batches_chunks_and_policies_change_no_token(settings: dict[str, object]) -> None:
    engine, runner = make_engine(**settings)
    prompts = [prompt_of(3 + 9 * i, seed=i % 4) for i in range(7)]
    record = run(engine, [add(prompt, f"r{i}", slots=[i]) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 8)


def test_preempted_sequences_keep_their_tokens() -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=9))
    prompts = [prompt_of(14, seed=i) for i in range(4)]
    record = run(engine, [add(p, f"r{i}", slots=[i], sampling=greedy(60)) for i, p in enumerate(prompts)])
    assert engine.load.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 60)


def test_a_step_says_what_the_tokens_that_it_brought_took(overlaps: bool) -> None:
    engine, _ = make_engine()
    engine.apply(add(prompt_of(100)))
    landed = []
    while engine.has_work:
        engine.step()
        landed.append(engine.landed)

    works = [work for work in landed if work is not None]
    assert landed[0] is None if overlaps else landed[0] == Work(64, 64 * 32, num_chunks=1)
    assert works[1] == Work(36, 36 * (64 + 18), num_chunks=1)
    assert [(work.num_sequences, work.num_context_tokens) for work in works[2:9]] == [(1, 101 + i) for i in range(7)]


def test_the_rest_of_a_cached_prompt_says_nothing_of_how_fast_prompts_are_computed() -> None:
    engine, _ = make_engine()
    run(engine, [add(prompt_of(40), "r0")])
    before = engine.load.prefill_tokens_per_s
    run(engine, [add(prompt_of(40), "r1")])

    assert engine.load.num_cached_tokens == 32
    assert engine.load.prefill_tokens_per_s == before > 0


def told(record: Record, kind: str) -> list[Progress]:
    return [progress for output in record.outputs for progress in output.progress if progress.kind == kind]


def test_prompt_in_many_chunks_is_told_of_at_every_eighth_and_at_its_end() -> None:
    engine, _ = make_engine(max_num_batched_tokens=8)
    record = run(engine, [add(prompt_of(137))])
    assert [(p.num_chunks, p.num_computed_tokens) for p in told(record, "prefill")] == [(8, 64), (16, 128), (18, 137)]


def test_prompt_in_one_chunk_and_decodes_are_not_told_of() -> None:
    engine, _ = make_engine()
    assert told(run(engine, [add(prompt_of(60))]), "prefill") == []


def test_preempted_request_is_told_of_with_the_tokens_it_lost() -> None:
    engine, _ = make_engine(TokenRunner(num_blocks=9))
    prompts = [prompt_of(14, seed=i) for i in range(4)]
    record = run(engine, [add(p, f"r{i}", slots=[i], sampling=greedy(60)) for i, p in enumerate(prompts)])
    preempted = told(record, "preempted")
    assert len(preempted) == engine.load.num_preemptions
    assert all(progress.num_computed_tokens >= 14 for progress in preempted)


def test_second_request_reuses_the_blocks_of_the_first() -> None:
    engine, runner = make_engine()
    prompt = prompt_of(40)
    run(engine, [add(prompt)])
    record = run(engine, [add(prompt + [9], "r1")])
    assert record.started["r1"].num_cached_tokens == 32
    assert sum(runner.steps[8].query_lens) == 41 - 32
    assert record.tokens("r1") == runner.greedy(prompt + [9], 8)


def test_prompt_that_is_cached_whole_is_answered_from_a_copied_block() -> None:
    engine, runner = make_engine()
    prompt = prompt_of(32)
    first = run(engine, [add(prompt)])
    record = run(engine, [add(prompt, "r1")])
    assert record.started["r1"].num_cached_tokens == 31
    assert record.tokens("r1") == first.tokens() == runner.greedy(prompt, 8)


def test_generated_blocks_are_reused_by_the_next_turn() -> None:
    engine, runner = make_engine()
    prompt = prompt_of(20)
    reply = run(engine, [add(prompt, sampling=greedy(30))]).tokens()
    record = run(engine, [add(prompt + reply + [7], "r1")])
    assert record.started["r1"].num_cached_tokens == 48


def test_different_salts_share_nothing() -> None:
    engine, _ = make_engine()
    run(engine, [add(prompt_of(40), salt="a")])
    assert run(engine, [add(prompt_of(40), "r1", salt="b")]).started["r1"].num_cached_tokens == 0


def test_without_prefix_cache_nothing_is_reused_or_told() -> None:
    engine, _ = make_engine(prefix_cache=False)
    first = run(engine, [add(prompt_of(40), emitted=[(), ()])])
    second = run(engine, [add(prompt_of(40), "r1")])
    assert second.started["r1"].num_cached_tokens == 0
    assert not any(output.stored or output.removed for output in first.outputs + second.outputs)
    assert engine.load.cached_hashes() == []


def test_stored_and_removed_blocks_are_told_so_that_a_reader_knows_what_is_here() -> None:
    engine, _ = make_engine(TokenRunner(num_blocks=8))
    known: set[bytes] = set()
    for i in range(6):
        for output in run(engine, [add(prompt_of(40, seed=i), f"r{i}")]).outputs:
            assert not set(output.stored) & known and set(output.removed) <= known
            known = (known | set(output.stored)) - set(output.removed)
    assert known == set(engine.load.cached_hashes())


# ---- beginnings and ends ----


def test_recovered_request_goes_on_where_it_was() -> None:
    engine, runner = make_engine()
    prompt = prompt_of(20)
    whole = runner.greedy(prompt, 12)
    record = run(engine, [add(prompt, epoch=3, emitted=[whole[:5]], sampling=greedy(12))])
    assert record.outcomes["r0", 0].first_index == 5
    assert record.tokens() == whole[5:]
    assert {row.epoch for output in record.outputs for row in output.rows} == {3}


def test_sampled_tokens_are_the_same_alone_batched_and_resumed() -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, presence_penalty=0.5, ignore_eos=True)
    prompt = prompt_of(18)
    alone = run(make_engine()[0], [add(prompt, sampling=sampling, seeds=[42])]).tokens()
    others = [add(prompt_of(9, seed=i), f"o{i}", slots=[50 + i], sampling=sampling) for i in range(5)]
    batched = run(make_engine()[0], [*others, add(prompt, sampling=sampling, seeds=[42])]).tokens()
    resumed = run(make_engine()[0], [add(prompt, sampling=sampling, seeds=[42], emitted=[alone[:7]], epoch=1)])
    assert alone == batched
    assert resumed.tokens() == alone[7:]


def test_stop_token_ends_a_stream_and_is_its_last_token() -> None:
    engine, runner = make_engine()
    expected = runner.greedy(prompt_of(5), 8)
    record = run(engine, [add(prompt_of(5), sampling=greedy(8, stop_token_ids=(expected[3],)))])
    assert record.tokens() == expected[: expected.index(expected[3]) + 1]
    assert record.outcomes["r0", 0].finish == FINISH_STOP


@pytest.mark.parametrize(("ignore_eos", "finish", "count"), [(False, FINISH_STOP, 1), (True, FINISH_LENGTH, 4)])
def test_end_of_sequence_token_stops_unless_ignored(ignore_eos: bool, finish: int, count: int) -> None:
    engine, _ = make_engine()
    sampling = greedy(4, ignore_eos=ignore_eos, logit_bias={EOS: 100.0})
    outcome = run(engine, [add(prompt_of(5), sampling=sampling)]).outcomes["r0", 0]
    assert (outcome.token_ids, outcome.finish) == ([EOS] * count, finish)


def test_min_tokens_holds_the_end_back() -> None:
    engine, _ = make_engine()
    sampling = greedy(9, ignore_eos=False, min_tokens=3, logit_bias={EOS: 100.0})
    tokens = run(engine, [add(prompt_of(5), sampling=sampling)]).tokens()
    assert EOS not in tokens[:3] and tokens[3:] == [EOS]


def test_no_tokens_wanted_is_an_end_at_once() -> None:
    engine, runner = make_engine()
    record = run(engine, [add(prompt_of(5), sampling=greedy(0))])
    assert (record.tokens(), record.outcomes["r0", 0].finish) == ([], FINISH_LENGTH)
    assert record.started["r0"].num_prompt_tokens == 5 and record.ended == [("r0", 0)] and not runner.steps


def test_without_max_tokens_a_stream_ends_where_the_context_does() -> None:
    engine, _ = make_engine(TokenRunner(max_model_len=50))
    record = run(engine, [add(prompt_of(20), sampling=greedy(None))])
    assert len(record.tokens()) == 30 and record.outcomes["r0", 0].finish == FINISH_LENGTH


def test_context_is_no_longer_than_the_kv_memory() -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=4))
    record = run(engine, [add(prompt_of(20), sampling=greedy(None)), add(prompt_of(8), "r1", slots=[1])])
    assert record.tokens() == runner.greedy(prompt_of(20), 44)
    assert record.tokens("r1", 1) == runner.greedy(prompt_of(8), 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": prompt_of(300)}, "context of 256"),
        ({"prompt": [64]}, "over the vocabulary of 64"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1], "sampling": greedy(2, logit_bias={64: 1.0})}, "logit_bias"),
    ],
    ids=["too long", "no such token", "empty", "bias"],
)
def test_bad_request_fails_alone(changes: dict[str, object], words: str) -> None:
    engine, runner = make_engine()
    good = add(prompt_of(10), "good", slots=[1])
    record = run(engine, [good, Add(make_request(**changes))])
    outcome = record.outcomes["r0", 0]
    assert outcome.finish == FINISH_ERROR and outcome.error is not None and words in outcome.error.message
    assert isinstance(outcome.error.to_error(), InvalidRequest)
    assert record.tokens("good", 1) == runner.greedy(prompt_of(10), 8)


def test_columns_that_are_cut_off_fail_alone() -> None:
    engine, runner = make_engine()
    whole = make_request(prompt_of(20), emitted=[(), ()])
    for column in ("prompt_token_ids", "block_hashes"):
        cut = msgspec.structs.replace(whole, **{column: getattr(whole, column)[:-1]})
        record = run(engine, [Add(cut)])
        assert [record.outcomes["r0", slot].finish for slot in (0, 1)] == [FINISH_ERROR] * 2
        assert record.ended == [("r0", 0)]
    assert run(engine, [add(prompt_of(20))]).tokens() == runner.greedy(prompt_of(20), 8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sequence_with_bad_logits_fails_alone(value: float) -> None:
    runner = TokenRunner()
    engine, _ = make_engine(runner)
    expected = runner.greedy(prompt_of(10), 8)
    runner.poisoned[61] = value
    record = run(engine, [add(prompt_of(10), "good", slots=[1]), add([*prompt_of(20), 61])])
    assert record.outcomes["r0", 0].finish == FINISH_ERROR and record.tokens() == []
    assert record.tokens("good", 1) == expected
    assert engine.pool.num_free_blocks == runner.num_blocks
    again = run(engine, [add(prompt_of(20), "r1", slots=[2])])
    assert again.started["r1"].num_cached_tokens == 0, "its blocks are not reused"


def test_fault_of_the_model_is_not_swallowed() -> None:
    engine, runner = make_engine()
    runner.forward = None  # type: ignore[assignment]  # a machine that fails
    with pytest.raises(TypeError):
        engine.step([add(prompt_of(10))])


def test_logprobs_come_with_their_tokens() -> None:
    engine, _ = make_engine()
    outcome = run(engine, [add(prompt_of(5), sampling=greedy(4, logprobs=3))]).outcomes["r0", 0]
    assert len(outcome.logprobs) == 4
    for token, (logprob, top_ids, top_values) in zip(outcome.token_ids, outcome.logprobs, strict=True):
        assert len(top_ids) == 3 and (token, logprob) == (top_ids[0], top_values[0])


# ---- n > 1 ----


def test_choices_share_the_prompts_blocks() -> None:
    engine, runner = make_engine(max_num_batched_tokens=512)
    prompt, record = prompt_of(40), Record()
    commands = [add(prompt, emitted=[(), (), ()], sampling=greedy(30, temperature=1.0))]
    while len(engine.running) < 3:
        step(engine, commands, record)
        commands = []
    shared = [engine.running[0].block_table[i] for i in range(2)]
    assert all(sequence.block_table[:2] == shared for sequence in engine.running)
    assert [engine.pool.ref_count(block_id) for block_id in shared] == [3, 3]
    held = runner.num_blocks - engine.pool.num_free_blocks
    assert held == 2 + sum(len(sequence.block_table) - 2 for sequence in engine.running)
    run(engine, record=record)
    assert record.started["r0"].num_cached_tokens == 0, "what the request itself computed is no hit"
    assert sum(sum(s.query_lens) for s in runner.steps) == 40 + 2 * 8 + 3 * 29
    assert len({tuple(record.tokens(slot=slot)) for slot in range(3)}) == 3
    assert record.ended == [("r0", 0)]


@pytest.mark.parametrize("length", [5, 32, 40])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("budget", [9, 512])
def test_each_choice_gets_what_it_would_get_alone(length: int, prefix_cache: bool, budget: int) -> None:
    prompt, sampling = prompt_of(length), greedy(12, temperature=1.0)
    engine, _ = make_engine(prefix_cache=prefix_cache, max_num_batched_tokens=budget)
    record = run(engine, [add(prompt, emitted=[()] * 4, seeds=[5, 6, 7, 8], sampling=sampling)])
    for slot, seed in enumerate([5, 6, 7, 8]):
        alone = run(make_engine()[0], [add(prompt, seeds=[seed], sampling=sampling)])
        assert record.tokens(slot=slot) == alone.tokens()


def test_choices_go_on_when_the_first_is_dropped_before_it_computed_the_prompt() -> None:
    engine, runner = make_engine(max_num_batched_tokens=16)
    record = Record()
    step(engine, [add(prompt_of(60), emitted=[(), ()])], record)
    run(engine, [Drop("r0", 0, (0,))], record=record)
    assert ("r0", 0) not in record.outcomes
    assert record.tokens(slot=1) == runner.greedy(prompt_of(60), 8)


# ---- drops and epochs ----


def test_dropped_request_frees_its_blocks_before_the_next_step() -> None:
    engine, runner = make_engine()
    record = Record()
    commands = [add(prompt_of(40), sampling=greedy(100)), add(prompt_of(20, 1), "r1", slots=[1])]
    for _ in range(3):
        step(engine, commands, record)
        commands = []
    step(engine, [Drop("r0", 0)], record)
    assert [sequence.request.request_id for sequence in engine.running] == ["r1"]
    assert runner.num_blocks - engine.pool.num_free_blocks == 2
    assert record.ended == [("r0", 0)]
    run(engine, record=record)
    assert record.tokens("r1", 1) == runner.greedy(prompt_of(20, 1), 8)


def test_request_dropped_while_it_waits_is_never_computed() -> None:
    engine, runner = make_engine(max_num_seqs=1)
    record = run(engine, [add(prompt_of(5)), add(prompt_of(6, 1), "r1", slots=[1]), Drop("r1", 0)])
    assert ("r1", 1) not in record.outcomes and set(record.ended) == {("r0", 0), ("r1", 0)}
    assert record.tokens() == runner.greedy(prompt_of(5), 8)


def test_one_choice_can_be_dropped() -> None:
    engine, runner = make_engine()
    record = Record()
    step(engine, [add(prompt_of(5), emitted=[(), ()], sampling=greedy(50))], record)
    step(engine, [Drop("r0", 0, (1,))], record)
    assert record.ended == []
    run(engine, record=record)
    assert record.tokens(slot=0) == runner.greedy(prompt_of(5), 50) and record.ended == [("r0", 0)]


def test_higher_epoch_replaces_a_lower_one_and_stale_commands_do_nothing() -> None:
    engine, _ = make_engine()
    record = Record()
    step(engine, [add(prompt_of(5), epoch=2)], record)
    step(engine, [add(prompt_of(5), epoch=1), Drop("r0", 1), Drop("unknown", 9)], record)
    assert record.ended == [] and len(engine.running) == 1
    fresh = Record()
    step(engine, [add(prompt_of(5), epoch=3)], fresh)
    step(engine, [], fresh)
    assert fresh.ended == [("r0", 2)]
    assert {row.epoch for output in fresh.outputs for row in output.rows} == {3}


def test_random_drops_leave_no_block_behind() -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=24))
    rng, record = random.Random(7), Record()
    for i in range(150):
        commands: list[object] = []
        if rng.random() < 0.6:
            choices = rng.randint(1, 3)
            commands.append(
                add(
                    prompt_of(rng.randint(1, 60), seed=rng.randint(0, 5)),
                    f"r{i}",
                    emitted=[()] * choices,
                    slots=[3 * i + k for k in range(choices)],
                    sampling=greedy(rng.randint(1, 40), temperature=rng.choice([0.0, 1.0])),
                )
            )
        if rng.random() < 0.5:
            commands.append(Drop(f"r{rng.randint(max(0, i - 20), i)}", 0))
        step(engine, commands, record)
    run(engine, record=record)
    assert engine.pool.num_free_blocks == runner.num_blocks
    assert len(record.ended) == len(set(record.ended)) > 50


# ---- the cache service ----


def offloads(record: Record) -> dict[bytes, bytes]:
    return {block_hash: data for output in record.outputs for block_hash, data in output.offload}


def wanted(record: Record) -> list[LoadWanted]:
    return [wanted for output in record.outputs for wanted in output.load]


def test_full_blocks_are_offered_once_each_when_a_cache_service_is_there() -> None:
    engine, _ = make_engine()
    assert offloads(run(engine, [add(prompt_of(40))])) == {}
    engine.exchange.set_available(True)
    prompt = prompt_of(40, seed=1)
    first = run(engine, [add(prompt, "r1", sampling=greedy(20))])
    tokens = (prompt + first.tokens("r1"))[:48]
    expected = block_hashes(chain_root(DIGEST), pack_u32(tokens))
    assert offloads(first) == {h: pack_u32(tokens[16 * i : 16 * i + 16]) for i, h in enumerate(expected)}
    assert offloads(run(engine, [add(prompt, "r2")])) == {}


def test_engine_on_a_cpu_offers_blocks_when_nothing_runs() -> None:
    engine, _ = make_engine(kv_offload="auto")
    engine.exchange.set_available(True)
    record = Record()
    engine.step([add(prompt_of(40), sampling=greedy(20))])
    while engine.running:
        step(engine, [], record)
        assert not offloads(record) or not engine.running
    run(engine, record=record)
    assert len(offloads(record)) == 3


def test_offload_can_be_switched_off() -> None:
    engine, _ = make_engine(kv_offload="never")
    engine.exchange.set_available(True)
    assert offloads(run(engine, [add(prompt_of(40))])) == {}


def test_long_prompts_are_offered_a_few_blocks_a_step_until_all_are() -> None:
    engine, _ = make_engine(max_num_batched_tokens=512, kv_load="never")
    engine.exchange.set_available(True)
    record = run(engine, [add(prompt_of(240), sampling=greedy(1))])
    assert len(offloads(record)) == 15
    assert max(len(output.offload) for output in record.outputs) <= 8


def test_only_so_many_blocks_are_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_svc.kv_exchange.MAX_OFFLOADING_BYTES", 4 * 64)
    engine, _ = make_engine(max_num_batched_tokens=512, kv_load="never", kv_offload="idle")
    engine.exchange.set_available(True)
    record = run(engine, [add(prompt_of(240), sampling=greedy(1))])
    assert len(offloads(record)) == 4 and not engine.has_work
    run(engine, [BlocksOffloaded(3)], record=record)
    assert len(offloads(record)) == 7
    # The time to send is over while anything runs.
    engine.step([BlocksOffloaded(4), add(prompt_of(20, seed=1), "r1", sampling=greedy(5))])
    while engine.running:
        step(engine, [], record)
        assert len(offloads(record)) == 7 or not engine.running
    run(engine, [BlocksOffloaded(4), BlocksOffloaded(4)], record=record)
    assert len(offloads(record)) > 7


def test_prompt_is_loaded_where_another_worker_left_it() -> None:
    source, _ = make_engine(kv_load="never")
    source.exchange.set_available(True)
    prompt = prompt_of(70)
    blocks = offloads(run(source, [add(prompt)]))

    engine, runner = make_engine()
    engine.exchange.set_available(True)
    record = Record()
    step(engine, [add(prompt), add(prompt_of(20, 1), "r1", slots=[1])], record)
    (load,) = wanted(record)
    assert load.hashes == tuple(block_hashes(chain_root(DIGEST), pack_u32(prompt)))
    assert engine.load.num_waiting == 1 and engine.load.num_running == 1
    answer = BlocksLoaded("r0", 0, load.hashes[:3], tuple(blocks[h] for h in load.hashes[:3]))
    run(engine, [answer], record=record)
    assert record.started["r0"].num_cached_tokens == 48
    assert record.tokens() == runner.greedy(prompt, 8)
    assert not set(offloads(record)) & set(load.hashes[:3]), "what came from there is not sent back"


@pytest.mark.parametrize("blocks", [(), (b"short",)], ids=["nothing", "damaged"])
def test_load_that_fails_costs_only_time(blocks: tuple[bytes, ...]) -> None:
    engine, runner = make_engine()
    engine.exchange.set_available(True)
    record = Record()
    step(engine, [add(prompt_of(70))], record)
    run(engine, [BlocksLoaded("r0", 0, wanted(record)[0].hashes[: len(blocks)], blocks)], record=record)
    assert record.started["r0"].num_cached_tokens == 0
    assert record.tokens() == runner.greedy(prompt_of(70), 8)


def test_requests_that_lack_the_same_blocks_ask_once_and_wait_together() -> None:
    engine, runner = make_engine()
    engine.exchange.set_available(True)
    record = Record()
    prompt = prompt_of(70)
    step(engine, [add(prompt), add(prompt, "r1", slots=[1], emitted=[()]), Drop("r0", 0)], record)
    assert len(wanted(record)) == 1 and not engine.has_work and engine.load.is_idle
    run(engine, [BlocksLoaded("r0", 0, (), ())], record=record)
    assert record.tokens("r1", 1) == runner.greedy(prompt, 8)
    assert set(record.ended) == {("r0", 0), ("r1", 0)}


def test_loaded_blocks_do_not_push_out_the_prefix_they_belong_to() -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=6), kv_load="always")
    prompt = prompt_of(90)
    record = run(engine, [add(prompt[:33], sampling=greedy(1))])
    engine.exchange.set_available(True)
    step(engine, [add(prompt, "r1", sampling=greedy(1))], record)
    (load,) = wanted(record)
    data = tuple(pack_u32(prompt[32 + 16 * i : 48 + 16 * i]) for i in range(len(load.hashes)))
    run(engine, [BlocksLoaded("r1", 0, load.hashes, data)], record=record)
    assert record.started["r1"].num_cached_tokens == 80
    assert record.tokens("r1") == runner.greedy(prompt, 1)


@pytest.mark.parametrize(
    ("settings", "rates", "expected"),
    [
        ({"kv_load": "never"}, (0, 0), False),
        ({"kv_load": "always"}, (1, 1e9), True),
        ({"kv_load": "auto"}, (0, 1e9), True),
        ({"kv_load": "auto"}, (1e9, 100), True),
        ({"kv_load": "auto"}, (1, 1e9), False),
        ({"prefix_cache": False}, (0, 0), False),
    ],
    ids=str,
)
def test_loading_is_weighed_against_computing(
    settings: dict[str, object], rates: tuple[float, float], expected: bool
) -> None:
    engine, _ = make_engine(**settings)
    engine.exchange.set_available(True)
    engine.exchange.load_bytes_per_s, engine.exchange.prefill_tokens_per_s = rates
    record = Record()
    step(engine, [add(prompt_of(70))], record)
    assert bool(wanted(record)) is expected


def test_cache_service_that_never_has_anything_is_asked_now_and_then_only() -> None:
    engine, _ = make_engine(TokenRunner(num_blocks=64))
    engine.exchange.set_available(True)

    def asks(number: int, **changes: object) -> LoadWanted | None:
        found = wanted(run(engine, [add(prompt_of(70, seed=number), f"r{number}", sampling=greedy(1), **changes)]))
        return found[0] if found else None

    def answer(load: LoadWanted, *blocks: bytes) -> None:
        run(engine, [BlocksLoaded(load.request_id, load.epoch, load.hashes[: len(blocks)], blocks)])

    asked = []
    for number in range(40):
        load = asks(number)
        asked.append(load is not None)
        if load is not None:
            answer(load)
    assert all(asked[:16]) and 2 <= sum(asked[16:]) <= 3
    # What another worker had begun may well be there; and where something was, more may be.
    load = asks(40, epoch=1)
    assert load is not None
    answer(load, pack_u32(prompt_of(70, seed=40)[:16]))
    assert asks(41) is not None


def test_short_prompts_are_computed_at_once() -> None:
    engine, _ = make_engine()
    engine.exchange.set_available(True)
    assert wanted(run(engine, [add(prompt_of(40))])) == []


def test_cache_service_that_comes_back_is_offered_everything_anew() -> None:
    engine, _ = make_engine()
    engine.exchange.set_available(True)
    first = offloads(run(engine, [add(prompt_of(40))]))
    engine.exchange.set_available(False)
    engine.exchange.set_available(True)
    again = offloads(run(engine, [add(prompt_of(40), "r1", sampling=greedy(30))]))
    assert set(again) > set(first) and len(first) == 2


# ---- numbers ----


def test_load_numbers_follow_the_engine() -> None:
    engine, runner = make_engine(max_num_seqs=2)
    load = engine.load
    assert load.is_idle and load.num_blocks == load.num_free_blocks == runner.num_blocks
    engine.step([add(prompt_of(20, i), f"r{i}", slots=[i]) for i in range(4)])
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens, load.is_idle) == (2, 2, 40, False)
    assert load.num_free_blocks == runner.num_blocks - 4
    run(engine)
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens, load.is_idle) == (0, 0, 0, True)
    assert load.num_output_tokens == 32 and load.num_prompt_tokens == 80
    assert load.prefill_tokens_per_s > 0 and load.decode_tokens_per_s > 0
    assert 0 < load.device_busy_share <= 1


def test_idle_engine_counts_books_that_do_not_balance() -> None:
    engine, _ = make_engine()
    engine.pool.allocate(1)
    engine.step()
    assert engine.load.num_violations == 1


def test_unwritten_slots_are_never_read() -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=6))
    run(engine, [add(prompt_of(17), emitted=[()] * 3)])
    assert runner.slots.count(NOTHING) > 0


# ---- the thread ----


def test_failure_of_the_thread_is_kept_for_the_service() -> None:
    engine, runner = make_engine()
    runner.forward = None  # type: ignore[assignment]  # a machine that fails

    class Loaded(TorchEngine):
        def _load(self) -> Engine:
            return engine

    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    thread = Loaded(make_folder(), make_settings())
    thread.submit(add(prompt_of(10)))
    thread.start(outputs.put)
    thread.stop()
    assert isinstance(thread.load.failure, TypeError)


def test_overlapped_step_is_launched_before_the_tokens_of_the_one_before_are_read(overlaps: bool) -> None:
    engine, runner = make_engine()
    record = Record()
    for launched in range(1, 5):
        step(engine, [add(prompt_of(5))] if launched == 1 else [], record)
        assert len(runner.steps) == launched
        assert len(record.outcomes["r0", 0].token_ids if record.outcomes else []) == launched - overlaps
    assert [bool(one.pending) for one in runner.steps] == [False, *[overlaps] * 3]


def test_token_after_the_last_is_never_told(overlaps: bool) -> None:
    engine, runner = make_engine()
    prompt = prompt_of(5)
    text = runner.greedy(prompt, 4)
    record = run(engine, [add(prompt, sampling=greedy(9, stop_token_ids=[text[-1]]))])
    assert record.tokens() == text[: text.index(text[-1]) + 1]
    assert len(runner.steps) == len(record.tokens()) + overlaps


def test_length_is_foreseen_so_that_nothing_is_computed_for_nothing() -> None:
    engine, runner = make_engine()
    run(engine, [add(prompt_of(5), sampling=greedy(4))])
    assert len(runner.steps) == 4


def test_a_worker_writes_its_steps_down(tmp_path: Path) -> None:
    settings = load(WorkerSettings, ["--model", "tales-1m", "--step-log", str(tmp_path / "steps")], {}, prog="test")
    engine = TorchEngine(model_folder.read(settings.model), settings)
    done: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    engine.start(done.put)
    engine.submit(Add(make_request(prompt_of(20), sampling=greedy(3))))
    while not done.get(timeout=30).ended:
        pass
    engine.stop()

    steps = list(read_steps(tmp_path / "steps" / "worker.csv"))

    assert [work for work, _ in steps] == [Work(20, 200, num_chunks=1), Work(0, 0, 1, 21), Work(0, 0, 1, 22)]
    assert all(seconds > 0 for _, seconds in steps)
