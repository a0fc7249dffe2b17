"""The engine with drafts: every stream gets what it would get without, in fewer steps."""

import math
import random
from collections.abc import Iterable

import pytest

from tests.support.engine_requests import DIGEST, make_request, make_settings
from tests.support.engine_runs import Record, run
from tests.support.guesses import MAX_LENGTH, Guesses
from tests.support.token_runner import TokenRunner
from weft.messages import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, SamplingParams
from worker_svc.engine import Engine
from worker_svc.engine_io import Add, Drop

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.3, max_tokens=20, ignore_eos=True)


@pytest.fixture(params=[False, True], ids=["in step", "overlapped"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_engine(
    runner: TokenRunner | None = None, *, guesses: bool = True, overlaps: bool = False, **settings: object
) -> tuple[Engine, TokenRunner]:
    runner = runner or TokenRunner()
    engine = Engine(
        runner,
        make_settings(**{"max_num_batched_tokens": 64, **settings}),
        digest=DIGEST,
        eos_token_ids=(2,),
        overlaps=overlaps,
        speculation=Guesses(runner) if guesses else None,
    )
    return engine, runner


def guesses_of(engine: Engine) -> Guesses:
    assert isinstance(engine._speculation, Guesses)
    return engine._speculation


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(3, 60) for _ in range(length)]


def add(prompt: list[int], request_id: str = "r0", **changes: object) -> Add:
    return Add(make_request(prompt, request_id=request_id, **{"sampling": GREEDY, **changes}))


def several(prompts: Iterable[list[int]], sampling: SamplingParams) -> list[Add]:
    return [add(prompt, f"r{i}", slots=[i], seeds=[i], sampling=sampling) for i, prompt in enumerate(prompts)]


def test_greedy_tokens_come_sooner_and_are_the_models_own(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    record = run(engine, [add(prompt_of(17))])
    assert record.tokens() == runner.greedy(prompt_of(17), 30)
    assert len(runner.steps) < 20
    load = engine.load
    assert load.num_output_tokens == 30 and 0 < load.num_accepted_tokens < load.num_drafted_tokens
    assert load.num_accepted_tokens == 30 - len(runner.steps)
    assert engine.pool.num_free_blocks == runner.num_blocks


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 9}, {"max_num_seqs": 2}, {"prefix_cache": False}, {"batching": "static"}],
    ids=str,
)
def test_batches_budgets_and_policies_change_no_token(settings: dict[str, object], overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps, **settings)
    prompts = [prompt_of(3 + 9 * i, seed=i % 3) for i in range(5)]
    record = run(engine, several(prompts, GREEDY))
    for i, prompt in enumerate(prompts):
        assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 30)
    assert max(len(step.token_ids) for step in runner.steps) <= settings.get("max_num_batched_tokens", 64)
    assert engine.load.num_accepted_tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.9},
        {"min_p": 0.05, "top_k": 20},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"logit_bias": {7: 3.0, 2: -2.0}},
        {"min_tokens": 10, "ignore_eos": False, "logit_bias": {2: 9.0}},
        {"logprobs": 2},
        {"temperature": 0.0, "frequency_penalty": 0.7, "logprobs": 1},
    ],
    ids=str,
)
def test_sampled_tokens_are_those_of_plain_decoding(changes: dict[str, object], overlaps: bool) -> None:
    sampling = SamplingParams(**{**{name: getattr(SAMPLED, name) for name in SAMPLED.__struct_fields__}, **changes})
    commands = several([prompt_of(9, seed=1), prompt_of(30, seed=2), prompt_of(5)], sampling)
    plain = run(make_engine(guesses=False)[0], commands)
    engine, _ = make_engine(overlaps=overlaps)
    drafted = run(engine, commands)
    assert engine.load.num_accepted_tokens
    for key, outcome in plain.outcomes.items():
        same = drafted.outcomes[key]
        assert (same.token_ids, same.finish) == (outcome.token_ids, outcome.finish)
        assert len(same.logprobs) == len(outcome.logprobs)
        # Rows are computed in other batches, and softmax sums in another order then.
        assert [ids for _, ids, _ in same.logprobs] == [ids for _, ids, _ in outcome.logprobs]
        assert [value for value, _, _ in same.logprobs] == pytest.approx([v for v, _, _ in outcome.logprobs], abs=1e-5)


def test_stop_token_within_a_run_of_accepted_tokens_is_the_last(overlaps: bool) -> None:
    for seed in range(6):
        engine, runner = make_engine(overlaps=overlaps)
        text = runner.greedy(prompt_of(8, seed), 12)
        stop = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(text[9],))
        outcome = run(engine, [add(prompt_of(8, seed), sampling=stop)]).outcomes["r0", 0]
        assert outcome.token_ids == text[: text.index(text[9]) + 1] and outcome.finish == FINISH_STOP


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_no_stream_gets_more_tokens_than_it_asked_for(max_tokens: int, overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    outcome = run(engine, [add(prompt_of(8), sampling=sampling)]).outcomes["r0", 0]
    assert outcome.token_ids == runner.greedy(prompt_of(8), max_tokens) and outcome.finish == FINISH_LENGTH
    assert max(step.seq_lens[0] for step in runner.steps) < 8 + max_tokens


def test_full_blocks_of_accepted_tokens_are_reused_by_the_next_turn(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    prompt = prompt_of(20)
    reply = run(engine, [add(prompt)]).tokens()
    record = run(engine, [add([*prompt, *reply, 7], "r1")])
    assert record.started["r1"].num_cached_tokens == 48
    assert record.tokens("r1") == runner.greedy([*prompt, *reply, 7], 30)


def test_scarce_memory_preempts_no_more_for_drafts_and_changes_no_token(overlaps: bool) -> None:
    prompts, counts = [prompt_of(14, seed=i) for i in range(4)], []
    for guesses in (False, True):
        engine, runner = make_engine(TokenRunner(num_blocks=9), guesses=guesses, overlaps=overlaps)
        record = run(engine, several(prompts, GREEDY))
        for i, prompt in enumerate(prompts):
            assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 30)
        counts.append(engine.load.num_preemptions)
    assert 0 < counts[1] <= counts[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_logits_after_accepted_tokens_end_the_stream_behind_them(value: float, overlaps: bool) -> None:
    for seed in range(5):
        engine, runner = make_engine(overlaps=overlaps)
        prompt, beside = prompt_of(8, seed), prompt_of(30)
        text, other = runner.greedy(prompt, 20), runner.greedy(beside, 30)
        bad = next(token for token in text[2:] if token not in [*prompt, *beside, *other])
        runner.poisoned[bad] = value
        record = run(engine, several([prompt, beside], GREEDY))
        outcome = record.outcomes["r0", 0]
        assert outcome.token_ids == text[: text.index(bad) + 1] and outcome.finish == FINISH_ERROR
        assert record.tokens("r1", 1) == other


def test_dropped_request_leaves_the_others_as_they_were(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    record = Record()
    for commands in (several([prompt_of(8), prompt_of(9)], GREEDY), [], [], [Drop("r0", 0)]):
        output = engine.step(commands)
        if output is not None:
            record.take(output)
    run(engine, record=record)
    assert record.tokens("r1", 1) == runner.greedy(prompt_of(9), 30)
    assert {sequence.slot for sequence in guesses_of(engine).forgotten} == {0, 1}


def test_drafter_is_told_of_every_token_and_step(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    record = run(engine, several([prompt_of(40), prompt_of(70, seed=1)], GREEDY))
    outcomes = guesses_of(engine).outcomes
    assert len(outcomes) == len(runner.steps)
    for i in (0, 1):
        told = [one for outcome in outcomes for one in outcome.emitted if one.sequence.slot == i]
        assert [token for one in told for token in one.token_ids] == record.tokens(f"r{i}", i)
        assert [one.first_index for one in told][0] == (40, 70)[i]
    assert not outcomes[0].is_decode and outcomes[-1].is_decode
    assert all(outcome.is_decode for outcome in outcomes if any(one.num_drafts for one in outcome.emitted))


def test_overlapped_engine_waits_for_tokens_only_if_the_drafter_does() -> None:
    engine, runner = make_engine(overlaps=True)
    guesses_of(engine).waits = False
    assert run(engine, [add(prompt_of(8))]).tokens() == runner.greedy(prompt_of(8), 30)
    assert engine.load.num_drafted_tokens == 0 and len(runner.steps) == 30
    guesses_of(engine).waits = True
    run(engine, [add(prompt_of(9), "r1")])
    assert engine.load.num_drafted_tokens > 0 and len(runner.steps) < 55


def test_drafts_are_computed_in_decode_steps_within_the_budget() -> None:
    engine, runner = make_engine(max_num_batched_tokens=6)
    run(engine, several([prompt_of(4, seed=i) for i in range(4)], GREEDY))
    drafted = [step for step in runner.steps if len(step.logit_rows) > len(step.query_lens)]
    assert drafted and all(len(step.token_ids) == len(step.logit_rows) <= 6 for step in drafted)
    assert max(max(step.query_lens) for step in drafted) <= MAX_LENGTH + 1
