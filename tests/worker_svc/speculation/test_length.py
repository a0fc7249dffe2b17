import random
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.decoding import Decoding, copying, fresh
from worker_svc.speculation.length import MIN_CHANCE, TRIAL_INTERVAL, DraftLength, best_choice

CHANCES = st.lists(
    st.lists(st.floats(0.02, 1), max_size=3).map(lambda row: sorted(row, reverse=True)), min_size=1, max_size=3
).filter(any)
COSTS = st.lists(st.floats(0, 0.6), min_size=9, max_size=9)


def free(num_tokens: int) -> float:
    return 1.0


def dear(num_tokens: int) -> float:
    return float(num_tokens)


def typical(num_tokens: int) -> float:
    """A few rows are free, many are not."""
    return max(4.0, 2.0 + 0.25 * num_tokens)


@settings(max_examples=50, deadline=None)
@given(CHANCES, COSTS, st.sampled_from([0.0, 0.3]))
def test_choice_is_the_best_of_all(chances: list[list[float]], added: list[float], drafting: float) -> None:
    added = [0.0, *added][: 1 + sum(map(len, chances))]

    def rate(lengths: Sequence[int]) -> float:
        expected = sum(sum(of_one[:length]) for of_one, length in zip(chances, lengths, strict=True))
        return (len(chances) + expected) / (1 + added[sum(lengths)] + drafting) / len(chances)

    choices = [lengths for lengths in product(*[range(len(of_one) + 1) for of_one in chances]) if any(lengths)]
    best = best_choice(chances, added, drafting)
    assert best.gain == pytest.approx(rate(best.lengths)) == pytest.approx(max(map(rate, choices)))


def test_each_draft_is_cut_where_its_own_tokens_stop_paying() -> None:
    choice = best_choice([[0.9, 0.8, 0.7], [0.1, 0.05], [0.9]], [0.1 * i for i in range(7)])
    assert choice.lengths == [3, 0, 1]


def test_making_the_draft_is_paid_for() -> None:
    length = DraftLength()
    length.observe(1, 100, 0, 1, 2.0)
    cheap, dear = (length.weigh([[0.6]], 100, 8, drafting_s) for drafting_s in (0.0, 1.0))
    assert cheap is not None and dear is not None and dear.gain == pytest.approx(cheap.gain * 1.2 / 1.7)
    assert length.allows(cheap) and not length.allows(dear)
    # Two tokens in a step of 2.4 seconds and a second of drafting, where 4 seconds would have gone.
    assert length.observe(1, 100, 1, 2, 2.4, drafting_s=1.0) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("cost", "least"), [(free, 3.0), (typical, 3.0), (dear, 0.98)], ids=["free", "typical", "dear"]
)
def test_text_that_copies_its_prompt_gains_what_the_machine_allows(cost, least: float) -> None:
    prompt = random.Random(1).sample(range(4096), 200)
    assert Decoding([prompt], [copying(600, prompt)], cost, noise=0.05).run().speedup > least


@pytest.mark.parametrize("num_sequences", [1, 6])
@pytest.mark.parametrize("cost", [free, typical, dear])
def test_fresh_text_loses_next_to_nothing(cost, num_sequences: int) -> None:
    rng = random.Random(num_sequences)
    prompts = [fresh(100, rng) for _ in range(num_sequences)]
    texts = [fresh(700, rng) for _ in range(num_sequences)]
    assert Decoding(prompts, texts, cost, noise=0.05).run().speedup > 0.98


@settings(max_examples=25, deadline=None)
@given(
    per_token=st.floats(0, 1.5),
    exponent=st.floats(0.5, 1.5),
    num_sequences=st.integers(1, 5),
    noise=st.sampled_from([0, 0.03]),
    seed=st.integers(0, 2**32),
)
def test_whatever_steps_cost_and_texts_are_the_loss_is_bounded(
    per_token: float, exponent: float, num_sequences: int, noise: float, seed: int
) -> None:
    rng = random.Random(seed)
    prompts = [fresh(60, rng) for _ in range(num_sequences)]
    texts = [
        [token for _ in range(4) for token in (fresh(rng.randrange(80), rng) + copying(rng.randrange(60), prompt))]
        for prompt in prompts
    ]
    done = Decoding(prompts, texts, lambda tokens: 1 + per_token * tokens**exponent, noise=noise, seed=seed).run()
    # What is in the account at first, one step that costs more than is left in it, and three per cent.
    largest = done.cost(num_sequences * 9)
    assert done.seconds <= 1.03 * done.plain_seconds + 2 * done.cost(num_sequences) + largest


def test_change_of_text_is_noticed_both_ways() -> None:
    def cost(num_tokens: int) -> float:
        return 2 + 0.5 * num_tokens

    rng = random.Random(5)
    prompt = rng.sample(range(4096), 300)
    text = fresh(400, rng) + copying(400, prompt) + fresh(400, rng) + copying(400, prompt)
    done = Decoding([prompt], [text], cost).run()
    foreseen = 800 * cost(1) + 800 / 9 * cost(9)
    assert done.seconds < 1.1 * foreseen


def test_larger_batches_get_shorter_drafts() -> None:
    def drafts_per_sequence(num_sequences: int) -> float:
        rng = random.Random(7)
        prompts = [fresh(400, rng) for _ in range(num_sequences)]
        # Half of it copies.
        texts = [[t for i in range(40) for t in prompt[10 * i : 10 * i + 5] + fresh(5, rng)] for prompt in prompts]
        done = Decoding(prompts, texts, typical).run()
        return sum(done.num_drafts) / num_sequences / len(done.num_drafts)

    assert drafts_per_sequence(1) > 1.5 * drafts_per_sequence(32)


def test_nothing_is_drafted_before_a_plain_step_was_measured() -> None:
    length = DraftLength()
    assert length.least_chance(2, 100, 8) is None and length.choose([[0.9], []], 100, 8) == [0, 0]
    length.observe(2, 100, 0, 2, 1.0)
    assert length.choose([[0.9], []], 100, 8) == [1, 0]
    assert length.choose([[0.9], []], 100, 0) == [0, 0] == length.choose([[], []], 100, 8)


def test_what_does_not_pay_is_tried_again_now_and_then_and_found_to_pay() -> None:
    length = DraftLength()

    def steps(count: int, seconds_with_draft: float) -> int:
        """Number of steps with drafts."""
        num_drafted = 0
        for _ in range(count):
            least = length.least_chance(1, 100, 1)
            (num_drafts,) = length.choose([[0.5] if least is not None and least <= 0.5 else []], 100, 1)
            num_drafted += num_drafts
            length.observe(1, 100, num_drafts, 1 + num_drafts, seconds_with_draft if num_drafts else 1.0)
        return num_drafted

    steps(10, 3.0)
    assert 1 <= steps(10 * TRIAL_INTERVAL, 3.0) <= 10
    assert steps(20 * TRIAL_INTERVAL, 1.0) > 10 * TRIAL_INTERVAL


@pytest.mark.parametrize("cost", [0.0, 0.4])
def test_least_chance_is_what_a_token_costs(cost: float) -> None:
    length = DraftLength()
    for num_drafts in [0, 8, 8] * 10:
        length.observe(4, 100, num_drafts, 4 + num_drafts, 1 + cost * num_drafts / 4)
    least = length.least_chance(4, 100, 8)
    # No more than what was measured, or the prior for fewer drafts than were tried.
    assert least == pytest.approx(max(min(cost, 0.2), MIN_CHANCE), abs=0.01)
