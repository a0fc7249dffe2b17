import random

import pytest

from worker_svc.speculation.cost import MAX_AGE, MAX_DRAFTED_STEPS, StepCost, shares

CONTEXT = 500


def measured(cost_of_draft: float, num_sequences: int = 4, num_drafts: int = 8, count: int = 5) -> StepCost:
    """Steps of 2 seconds, to which a drafted token adds `cost_of_draft` times what one of the sequences takes."""
    cost = StepCost()
    for _ in range(count):
        cost.observe(num_sequences, CONTEXT, 0, 2.0)
        cost.observe(num_sequences, CONTEXT, num_drafts, 2.0 * (1 + cost_of_draft * num_drafts / num_sequences))
    return cost


def test_step_that_was_never_measured_is_unknown() -> None:
    cost = measured(0.5)
    assert cost.plain_seconds(4, CONTEXT) == 2.0
    assert cost.plain_seconds(5, CONTEXT) is None and cost.plain_seconds(4, 8 * CONTEXT) is None


def test_slow_step_now_and_then_moves_nothing() -> None:
    cost = measured(0.5, count=15)
    for num_drafts in (0, 8, 0, 8, 0, 8):
        cost.observe(4, CONTEXT, num_drafts, 100.0)
    assert cost.plain_seconds(4, CONTEXT) == 2.0
    # The prior weighs a hundredth.
    assert cost.token_costs(4, CONTEXT, 8)[-1] == pytest.approx(0.5, rel=0.01)


def test_plain_step_wants_to_be_measured_again_after_many_with_drafts() -> None:
    cost = measured(0.1)
    for _ in range(MAX_DRAFTED_STEPS - 1):
        cost.observe(4, CONTEXT, 8, 2.4)
    assert cost.plain_seconds(4, CONTEXT) is None
    cost.observe(4, CONTEXT, 0, 2.0)
    assert cost.plain_seconds(4, CONTEXT) == 2.0


@pytest.mark.parametrize("true_cost", [0.0, 0.3, 1.0])
def test_cost_of_a_drafted_token_is_found_in_noise(true_cost: float) -> None:
    rng, cost = random.Random(3), StepCost()
    for num_drafts in [0, 4, 16] * 15:
        seconds = 2.0 * (1 + true_cost * num_drafts / 16)
        cost.observe(16, CONTEXT, num_drafts, seconds * rng.gauss(1, 0.05))
    # Steps vary by 5 %, those with drafts take up to twice as long as plain ones, and medians halve that at best.
    assert cost.token_costs(16, CONTEXT, 16)[-1] == pytest.approx(true_cost, abs=0.15)


def test_cost_of_a_few_measurements_of_little_is_mostly_the_prior() -> None:
    cost = StepCost()
    cost.observe(32, CONTEXT, 0, 2.0)
    cost.observe(32, CONTEXT, 1, 2.2)
    assert cost.token_costs(32, CONTEXT, 1)[0] < 0.25, "ten per cent of a step are its noise, not a token's cost"


def test_more_drafts_are_as_dear_as_fewer_until_measured_and_other_steps_as_these() -> None:
    cost = measured(0.7)
    for costs in (cost.token_costs(4, CONTEXT, 64), cost.token_costs(4, 8 * CONTEXT, 64)):
        assert costs[4:] == [costs[3]] * 3 and costs[3] == pytest.approx(0.7, abs=0.03)


def test_what_is_long_past_is_forgotten() -> None:
    cost = measured(0.9)
    for _ in range(MAX_AGE + 1):
        cost.observe(1, CONTEXT, 0, 1.0)
    assert cost.token_costs(4, CONTEXT, 8) == StepCost().token_costs(4, CONTEXT, 8)


def test_shares_are_those_of_each_number_of_drafts() -> None:
    assert shares([0.1, 0.2, 0.3, 0.4], 2, 6) == pytest.approx([0, 0.05, 0.2, 0.45, 0.6, 1.0, 1.2])
    assert shares([0.1], 2, 1) == pytest.approx([0, 0.05])
