from dataclasses import replace

import pytest
import torch

from worker_svc.kernels.penalties import Bias, Penalties, count_completion_, count_prompt_

V = 50


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


@pytest.mark.parametrize("num_tokens", [1, 127, 300])
def test_state_is_twice_the_count_in_the_completion_plus_whether_in_the_prompt(num_tokens: int) -> None:
    state = torch.zeros(3, V, dtype=torch.int32)
    prompt, completion = (torch.randint(V, (num_tokens,)) for _ in range(2))
    slots = torch.randint(-1, 3, (num_tokens,), dtype=torch.int32)
    count_prompt_(state, slots, prompt)
    count_completion_(state, slots, completion)
    for slot in range(3):
        counts = torch.bincount(completion[slots == slot], minlength=V)
        is_prompt = torch.bincount(prompt[slots == slot], minlength=V) > 0
        assert torch.equal(state[slot].long(), 2 * counts + is_prompt)


def test_tokens_without_a_slot_and_no_tokens_count_nowhere() -> None:
    state = torch.zeros(2, V, dtype=torch.int32)
    count_prompt_(state, torch.full((4,), -1, dtype=torch.int32), torch.arange(4))
    count_completion_(state, torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    assert not state.any()


@pytest.mark.parametrize(
    ("state", "slots", "message"),
    [
        (torch.zeros(2, V), torch.zeros(3, dtype=torch.int32), "state is torch.float32, expected torch.int32"),
        (torch.zeros(2, 2 * V, dtype=torch.int32)[:, :V], torch.zeros(3, dtype=torch.int32), "state has strides"),
        (torch.zeros(2, V, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), r"slots has shape \(4,\)"),
        (torch.zeros(2, V, dtype=torch.int32), torch.zeros(3), "slots is torch.float32, expected torch.int32"),
    ],
)
def test_wrong_tensor_is_named(state: torch.Tensor, slots: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_prompt_(state, slots, torch.arange(3))


PENALTIES = Penalties(
    torch.zeros(2, dtype=torch.int32), torch.zeros(1, V, dtype=torch.int32), torch.ones(2), torch.ones(2), torch.ones(2)
)
NO_ENTRIES = torch.empty(0, dtype=torch.int32)
BIAS = Bias(torch.zeros(3, dtype=torch.int32), NO_ENTRIES, torch.empty(0), NO_ENTRIES)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (replace(PENALTIES, slots=torch.zeros(3, dtype=torch.int32)), r"slots has shape \(3,\), expected \(2,\)"),
        (replace(PENALTIES, state=torch.zeros(1, 9, dtype=torch.int32)), r"state has shape \(1, 9\)"),
        (replace(PENALTIES, frequency=torch.ones(2).double()), "frequency is torch.float64"),
        (replace(BIAS, offsets=torch.zeros(2, dtype=torch.int32)), r"offsets has shape \(2,\), expected \(3,\)"),
        (replace(BIAS, until=torch.zeros(1, dtype=torch.int32)), r"until has shape \(1,\), expected \(0,\)"),
        (replace(BIAS, token_ids=torch.empty(0, dtype=torch.int64)), "token_ids is torch.int64"),
    ],
)
def test_wrong_parameter_is_named(parameters: Penalties | Bias, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if isinstance(parameters, Penalties):
            parameters.check(2, V)
        else:
            parameters.check(2)
