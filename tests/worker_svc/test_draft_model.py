"""Drafts of a model of its own: what it reads is what the sequences are, and no stream gets another text."""

import random
from collections.abc import Sequence as Ids

import pytest
import torch

from tests.support.engine_requests import DIGEST, make_request, make_settings
from tests.support.engine_runs import Record, run, step
from tests.support.token_runner import TokenRunner
from weft.messages import SamplingParams
from worker_svc.draft_model import DraftModel
from worker_svc.engine import Engine
from worker_svc.engine_io import Add, Drop

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)


class Drafter(TokenRunner):
    """Sees to it that it reads nothing but sequences that run, and what was drafted for them."""

    engine: Engine
    error_rate = 0.0

    def logits(self, context: Ids[int]) -> torch.Tensor:
        known = [sequence.token_ids for sequence in self.engine.running]
        assert any(list(context[: len(token_ids)]) == token_ids for token_ids in known)
        logits = super().logits(context)
        is_wrong = random.Random(hash(tuple(context)) + 1).random() < self.error_rate
        return logits.roll(1) if is_wrong else logits


class Clock:
    """Each step takes a second; drafting takes what it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


def make_engine(*, num_blocks: int = 64, round_s: float = 0.0, **settings: object) -> tuple[Engine, Drafter]:
    target, drafter = TokenRunner(num_blocks=num_blocks), Drafter(num_blocks=num_blocks)
    sampler, clock = target.make_sampler(), Clock()

    def drafting_clock() -> float:
        clock.now += round_s / 2
        return clock.now

    engine = Engine(
        target,
        make_settings(**{"max_num_batched_tokens": 64, **settings}),
        digest=DIGEST,
        eos_token_ids=(2,),
        sampler=sampler,
        speculation=DraftModel(drafter, sampler, max_length=4, max_num_batched_tokens=64, clock=drafting_clock),
        clock=clock,
    )
    drafter.engine = engine
    return engine, drafter


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(1000 * seed + length)
    return [rng.randrange(3, 60) for _ in range(length)]


def add(prompt: list[int], request_id: str = "r0", **changes: object) -> Add:
    return Add(make_request(prompt, request_id=request_id, **{"sampling": GREEDY, **changes}))


def several(prompts: Ids[list[int]], sampling: SamplingParams = GREEDY) -> list[Add]:
    return [add(prompt, f"r{i}", slots=[i], seeds=[i], sampling=sampling) for i, prompt in enumerate(prompts)]


def plain_tokens(commands: list[Add]) -> dict[tuple[str, int], list[int]]:
    engine = Engine(TokenRunner(), make_settings(), digest=DIGEST, eos_token_ids=(2,))
    return {key: outcome.token_ids for key, outcome in run(engine, commands).outcomes.items()}


def tokens(record: Record) -> dict[tuple[str, int], list[int]]:
    return {key: outcome.token_ids for key, outcome in record.outcomes.items()}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("error_rate", [0.0, 0.4])
@pytest.mark.parametrize("settings", [{}, {"prefix_cache": False}, {"num_blocks": 9}, {"max_num_seqs": 2}], ids=str)
def test_streams_get_what_they_would_get_without_a_drafter(
    sampling: SamplingParams, error_rate: float, settings: dict[str, object]
) -> None:
    commands = several([prompt_of(8 + 3 * i, seed=i) for i in range(4)], sampling)
    engine, drafter = make_engine(**settings)
    drafter.error_rate = error_rate
    assert tokens(run(engine, commands)) == plain_tokens(commands)
    assert drafter.steps and engine.load.num_accepted_tokens


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_model_that_is_the_target_itself_is_nearly_always_right(sampling: SamplingParams) -> None:
    engine, _ = make_engine()
    run(engine, several([prompt_of(20, seed=i) for i in range(3)], sampling))
    # Prompt lookup is tried now and then, and not right here.
    assert engine.load.num_accepted_tokens > 0.8 * engine.load.num_drafted_tokens > 40


def test_each_token_is_read_once() -> None:
    engine, drafter = make_engine()
    record = run(engine, [add(prompt_of(20))])
    assert sum(map(len, (one.token_ids for one in drafter.steps))) <= 20 + len(record.tokens())


def test_blocks_that_the_drafter_knows_by_hash_are_not_read_again() -> None:
    engine, drafter = make_engine()
    run(engine, [add(prompt_of(40))])
    before = len(drafter.steps)
    run(engine, [add([*prompt_of(40)[:32], 7, 8, 9], "r1")])
    assert len(drafter.steps[before].token_ids) < 16


def test_choices_of_one_prompt_share_what_the_drafter_read() -> None:
    engine, _ = make_engine()
    commands = [add(prompt_of(40), emitted=[(), (), ()], seeds=[1, 2, 3], sampling=SAMPLED)]
    assert tokens(run(engine, commands)) == plain_tokens(commands)


def test_dropped_sequence_is_forgotten() -> None:
    engine, drafter = make_engine()
    record = Record()
    step(engine, several([prompt_of(8), prompt_of(9)]), record)
    for _ in range(3):
        step(engine, [], record)
    run(engine, [Drop("r0", 0)], record=record)
    assert record.tokens("r1", 1) == TokenRunner().greedy(prompt_of(9), 30)
    assert not engine._speculation._streams  # type: ignore[union-attr]


def test_drafting_that_takes_longer_than_it_saves_is_given_up() -> None:
    engine, drafter = make_engine(round_s=2.0)
    drafter.error_rate = 0.9
    run(engine, [add(prompt_of(10), sampling=SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True))])
    assert len(drafter.steps) < 20


def test_sequences_beyond_the_drafters_context_go_without() -> None:
    engine, drafter = make_engine()
    drafter.max_model_len = 20
    prompt = prompt_of(12)
    assert run(engine, [add(prompt)]).tokens() == plain_tokens([add(prompt)])["r0", 0]
    assert drafter.steps and max(max(one.seq_lens) for one in drafter.steps) <= 20 + 4


def test_long_prompts_are_read_within_the_budget() -> None:
    engine, drafter = make_engine(max_num_batched_tokens=64)
    run(engine, several([prompt_of(60, seed=i) for i in range(3)]))
    assert max(len(one.token_ids) for one in drafter.steps) <= 64
