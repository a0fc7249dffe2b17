"""The engine under every batching policy, and handing choices back as it is told: the tokens stay the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_requests import DIGEST, make_request, make_settings
from tests.support.engine_runs import Record, run
from tests.support.guesses import Guesses
from tests.support.token_runner import TokenRunner
from weft.hashing import BLOCK_SIZE
from weft.messages import FINISH_LENGTH, FINISH_STOP, FINISH_YIELD, SamplingParams
from worker_svc.batch import POLICIES, RESERVATIONS
from worker_svc.engine import Engine
from worker_svc.engine_io import Add

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=40, min_tokens=9, temperature=1.0, top_p=0.95, presence_penalty=0.5, repetition_penalty=1.1
)


@pytest.fixture(params=[False, True], ids=["in step", "overlapped"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_engine(
    runner: TokenRunner | None = None, *, overlaps: bool = False, guesses: bool = False, **changes: Any
) -> tuple[Engine, TokenRunner]:
    runner = runner or TokenRunner()
    engine = Engine(
        runner,
        make_settings(**{"max_num_batched_tokens": 64, **changes}),
        digest=DIGEST,
        eos_token_ids=(2,),
        overlaps=overlaps,
        speculation=Guesses(runner) if guesses else None,
    )
    return engine, runner


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(3, 60) for _ in range(length)]


def add(prompt: list[int], request_id: str = "r0", *, stop_after: int | None = None, **changes: Any) -> Add:
    return Add(make_request(prompt, request_id=request_id, **{"sampling": GREEDY, **changes}), stop_after)


# ---- batching and reservations ----


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("reserve", RESERVATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_a_token(policy: str, reserve: str, guesses: bool, overlaps: bool) -> None:
    chosen = {"batching": policy, "reserve": reserve, "max_num_batched_tokens": 24}
    engine, runner = make_engine(overlaps=overlaps, guesses=guesses, **chosen)
    prompts = [prompt_of(3 + 13 * i, seed=i % 3) for i in range(7)]
    record = run(engine, [add(prompt, f"r{i}", slots=[i]) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 40)
    assert engine.pool.num_free_blocks == runner.num_blocks


@pytest.mark.parametrize("policy", POLICIES)
def test_who_is_preempted_keeps_its_tokens_under_every_policy(policy: str, overlaps: bool) -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=9), overlaps=overlaps, batching=policy)
    prompts = [prompt_of(14, seed=i) for i in range(4)]
    record = run(engine, [add(prompt, f"r{i}", slots=[i]) for i, prompt in enumerate(prompts)])
    assert engine.load.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 40)


@pytest.mark.parametrize("reserve", [name for name in RESERVATIONS if name != "paged"])
def test_nobody_who_has_reserved_is_preempted(reserve: str, overlaps: bool) -> None:
    engine, _ = make_engine(TokenRunner(num_blocks=9), overlaps=overlaps, reserve=reserve)
    record = run(engine, [add(prompt_of(14, seed=i), f"r{i}", slots=[i]) for i in range(4)])
    assert engine.load.num_preemptions == 0
    assert {outcome.finish for outcome in record.outcomes.values()} == {FINISH_LENGTH}


# ---- handing back ----


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("stop_after", [1, 2, 15, 16, 17, 39])
def test_choice_is_handed_back_after_exactly_so_many_new_tokens(stop_after: int, guesses: bool, overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps, guesses=guesses)
    record = run(engine, [add(prompt_of(20), stop_after=stop_after)])
    assert record.tokens() == runner.greedy(prompt_of(20), 40)[:stop_after]
    assert record.outcomes["r0", 0].finish == FINISH_YIELD
    assert record.ended == [("r0", 0)] and engine.pool.num_free_blocks == runner.num_blocks


def test_only_new_tokens_count(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    whole = runner.greedy(prompt_of(20), 40)
    record = run(engine, [add(prompt_of(20), emitted=[whole[:9]], epoch=1, stop_after=5)])
    assert (record.tokens(), record.outcomes["r0", 0].first_index) == (whole[9:14], 9)


@pytest.mark.parametrize("stop_after", [5, 6, 1000])
def test_choice_that_has_all_its_tokens_has_ended_by_itself(stop_after: int, overlaps: bool) -> None:
    engine, _ = make_engine(overlaps=overlaps)
    sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    record = run(engine, [add(prompt_of(20), sampling=sampling, stop_after=stop_after)])
    assert (len(record.tokens()), record.outcomes["r0", 0].finish) == (5, FINISH_LENGTH)


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("late", [0, 3])
def test_stop_token_ends_a_choice_even_as_the_last_before_it_is_handed_back(
    late: int, guesses: bool, overlaps: bool
) -> None:
    engine, runner = make_engine(overlaps=overlaps, guesses=guesses)
    whole = runner.greedy(prompt_of(20), 40)
    at = next(i for i in range(4, 40) if whole[i] not in whole[:i])
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop_token_ids=(whole[at],))
    record = run(engine, [add(prompt_of(20), sampling=sampling, stop_after=at + 1 + late)])
    assert (record.tokens(), record.outcomes["r0", 0].finish) == (whole[: at + 1], FINISH_STOP)


def test_each_choice_is_handed_back_on_its_own_and_the_request_ends_with_the_last(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    whole = runner.greedy(prompt_of(20), 40)
    command = add(prompt_of(20), emitted=[(), whole[:30], whole[:37]], epoch=2, stop_after=6)
    record = run(engine, [command])
    assert [record.tokens(slot=slot) for slot in range(3)] == [whole[:6], whole[30:36], whole[37:]]
    finishes = [record.outcomes["r0", slot].finish for slot in range(3)]
    assert finishes == [FINISH_YIELD, FINISH_YIELD, FINISH_LENGTH]
    assert record.ended == [("r0", 2)]


def test_who_is_preempted_is_handed_back_no_sooner_and_no_later(overlaps: bool) -> None:
    engine, runner = make_engine(TokenRunner(num_blocks=9), overlaps=overlaps)
    prompts = [prompt_of(14, seed=i) for i in range(4)]
    record = run(engine, [add(prompt, f"r{i}", slots=[i], stop_after=35) for i, prompt in enumerate(prompts)])
    assert engine.load.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert record.tokens(f"r{i}", i) == runner.greedy(prompt, 35)
        assert record.outcomes[f"r{i}", i].finish == FINISH_YIELD


def test_request_that_comes_back_finds_what_it_has_computed(overlaps: bool) -> None:
    engine, runner = make_engine(overlaps=overlaps)
    first = run(engine, [add(prompt_of(20), stop_after=30)])
    computed = sum(sum(one.query_lens) for one in runner.steps)
    run(engine, [add(prompt_of(20), emitted=[first.tokens()], epoch=1)])
    # Of 50 tokens 48 are in full blocks.
    assert sum(sum(one.query_lens) for one in runner.steps) - computed <= 2 + 10 + overlaps


def test_who_prefills_for_others_sends_blocks_in_the_step_that_fills_them() -> None:
    engine, _ = make_engine(role="prefill", kv_load="never", max_num_batched_tokens=160)
    engine.exchange.set_available(True)
    outputs = run(engine, [add(prompt_of(210), stop_after=1)]).outputs
    assert [len(output.offload) for output in outputs] == [160 // BLOCK_SIZE, 50 // BLOCK_SIZE]
    # With the last of them comes the first token, and with it the end.
    assert outputs[1].ended == (("r0", 0),)


def in_quanta(
    prompt: list[int], sampling: SamplingParams, quanta: list[int | None], num_choices: int
) -> list[list[int]]:
    """What choices get that go from engine to engine, as a gateway would send them on."""
    engines = [make_engine()[0], make_engine(overlaps=True, guesses=True)[0]]
    tokens: list[list[int]] = [[] for _ in range(num_choices)]
    open_slots = list(range(num_choices))
    for epoch, quantum in enumerate(quanta):
        command = add(
            prompt,
            emitted=[tokens[slot] for slot in open_slots],
            slots=open_slots,
            seeds=[100 + slot for slot in open_slots],
            sampling=sampling,
            epoch=epoch,
            stop_after=quantum,
        )
        record = run(engines[epoch % 2], [command], record=Record())
        for slot in open_slots:
            tokens[slot] += record.tokens(slot=slot)
        open_slots = [slot for slot in open_slots if record.outcomes["r0", slot].finish == FINISH_YIELD]
        if not open_slots:
            break
    assert not open_slots
    return tokens


@given(st.lists(st.integers(1, 20), max_size=6), st.sampled_from([GREEDY, SAMPLED]), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_tokens_in_any_quanta_on_any_engines_are_those_of_one_pass(
    quanta: list[int], sampling: SamplingParams, num_choices: int
) -> None:
    once = in_quanta(prompt_of(18), sampling, [None], num_choices)
    assert in_quanta(prompt_of(18), sampling, [*quanta, None], num_choices) == once
