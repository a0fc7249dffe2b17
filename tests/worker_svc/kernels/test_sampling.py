from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from tests.support.engine_requests import make_sequence
from weft.messages import SamplingParams
from worker_svc.kernels.noise import seeds_tensor
from worker_svc.kernels.penalties import Bias, Penalties
from worker_svc.kernels.sampling import sample, sample_reference
from worker_svc.kernels.top_k_top_p import Filters
from worker_svc.kernels.tuning import Config
from worker_svc.sampler import Sampler

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config({"BLOCK": 64, "GROUP": 32, "SCAN": 128}, num_warps=1)
Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True, params=[0])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


def make_columns(num_rows: int, temperature: float | None = None) -> Columns:
    """Temperatures, some of them 0 if none is given, seeds and positions."""
    temperatures = torch.rand(num_rows) * 2 * (torch.arange(num_rows) % 4 != 1)
    if temperature is not None:
        temperatures.fill_(temperature)
    return temperatures, torch.randint(-(2**63), 2**63 - 1, (num_rows,)), torch.randint(1000, (num_rows,))


def make_penalties(num_rows: int, vocab_size: int) -> Penalties:
    """For all rows but the first."""
    slots = torch.randperm(num_rows, dtype=torch.int32)
    slots[0] = -1
    state = torch.randint(-6, 6, (num_rows, vocab_size), dtype=torch.int32).clamp(min=0)
    repetition, frequency, presence = torch.rand(3, num_rows)
    return Penalties(slots, state, 0.2 + 2 * repetition, 2 * frequency - 1, 4 * presence - 2)


def make_bias(num_rows: int, vocab_size: int) -> Bias:
    """No entry for the first row, then one more for each."""
    counts = torch.arange(num_rows)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    size = int(offsets[-1])
    values = torch.where(torch.rand(size) < 0.3, -torch.inf, 5 * torch.randn(size))
    # Buffers of a graph are longer than what is in them.
    token_ids = torch.randint(vocab_size, (size + 3,), dtype=torch.int32)
    return Bias(offsets, token_ids, torch.cat([values, torch.full((3,), 99.0)]), torch.full((size + 3,), 500).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 130])
def test_tokens_are_those_of_the_reference(vocab_size: int, dtype: torch.dtype) -> None:
    logits, columns = (3 * torch.randn(4, vocab_size)).to(dtype), make_columns(4)
    token_ids, is_bad = sample(logits, *columns, config=SMALL)
    assert torch.equal(token_ids, sample_reference(logits, *columns)[0]) and not is_bad.any()


def test_everything_mixed_gives_the_tokens_of_the_reference() -> None:
    num_rows, vocab_size = 9, 70
    logits, columns = 3 * torch.randn(num_rows, vocab_size), make_columns(num_rows)
    filters = Filters(torch.arange(9).int() * 5, 0.2 + 0.1 * torch.arange(9.0), torch.arange(9) % 3 * 0.02)
    more = filters, make_penalties(num_rows, vocab_size), make_bias(num_rows, vocab_size)
    assert torch.equal(sample(logits, *columns, *more, SMALL)[0], sample_reference(logits, *columns, *more)[0])


def test_penalties_choose_as_those_of_the_reference() -> None:
    # Logits so near to each other that the penalties decide.
    logits, columns, penalties = 0.1 * torch.randn(24, 40), make_columns(24, temperature=0.0), make_penalties(24, 40)
    expected = sample_reference(logits, *columns, penalties=penalties)[0]
    before = penalties.state.clone()
    assert torch.equal(sample(logits, *columns, penalties=penalties, config=SMALL)[0], expected)
    assert not torch.equal(expected, logits.argmax(dim=1))
    assert torch.equal(penalties.state, before)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.randn(4, 200)
    logits[:, [150, 70, 199, 71]] = 9.0
    token_ids, _ = sample(logits, *make_columns(4, temperature=0.0), config=SMALL)
    assert token_ids.tolist() == [70] * 4


@pytest.mark.parametrize(("value", "place"), [(torch.nan, 0), (torch.inf, 64), (-torch.inf, 79)])
def test_row_that_is_not_finite_is_bad_and_leaves_its_neighbours_exact(value: float, place: int) -> None:
    logits, columns = torch.randn(3, 80), make_columns(3, temperature=1.0)
    filters = Filters(torch.tensor([0, 5, 5]).int(), torch.tensor([0.9, 0.9, 1.0]), torch.zeros(3))
    expected = sample_reference(logits, *columns, filters)[0]
    logits[1, place] = value
    token_ids, is_bad = sample(logits, *columns, filters, config=SMALL)
    assert is_bad.tolist() == [False, True, False]
    assert token_ids.tolist() == [int(expected[0]), 0, int(expected[2])]


def test_bias_of_minus_infinity_is_not_bad() -> None:
    logits, columns = torch.randn(2, 70), make_columns(2, temperature=0.0)
    token_ids = logits.argmax(dim=1).int()
    bias = Bias(torch.arange(3).int(), token_ids, torch.full((2,), -torch.inf), columns[2].int() + 1)
    found, is_bad = sample(logits, *columns, bias=bias, config=SMALL)
    assert not is_bad.any()
    assert torch.equal(found, logits.topk(2, dim=1).indices[:, 1])


def test_bias_ends_at_its_position() -> None:
    logits, columns = torch.randn(2, 70), make_columns(2, temperature=0.0)
    bias = Bias(torch.arange(3).int(), torch.tensor([3, 4]).int(), torch.full((2,), 50.0), columns[2].int() + 1)
    assert sample(logits, *columns, bias=bias, config=SMALL)[0].tolist() == [3, 4]
    ended = replace(bias, until=columns[2].int())
    assert torch.equal(sample(logits, *columns, bias=ended, config=SMALL)[0], logits.argmax(dim=1))


def test_row_that_may_choose_nothing_gets_token_0() -> None:
    columns = make_columns(2)
    bias = Bias(
        torch.tensor([0, 0, 2]).int(),
        torch.arange(2).int(),
        torch.full((2,), -torch.inf),
        torch.full((2,), 2**30).int(),
    )
    filters = Filters(torch.tensor([0, 1]).int(), torch.full((2,), 0.5), torch.zeros(2))
    token_ids, is_bad = sample(torch.tensor([[0.0, 99.0], [0.0, 99.0]]), *columns, filters, bias=bias, config=SMALL)
    assert token_ids.tolist() == [1, 0] and not is_bad.any()


def test_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    logits, columns = 2 * torch.randn(5, 80), make_columns(5)
    together = sample(logits, *columns, config=SMALL)[0]
    for row in range(5):
        alone = sample(logits[row : row + 1], *(column[row : row + 1] for column in columns), config=SMALL)[0]
        assert int(alone) == int(together[row])


def test_strided_rows_are_read_where_they_are_and_nothing_is_overwritten() -> None:
    wide = torch.full((4, 100), torch.nan)
    wide[:, 10:90].normal_()
    before, columns = wide.clone(), make_columns(4)
    token_ids, is_bad = sample(wide[:, 10:90], *columns, config=SMALL)
    assert torch.equal(token_ids, sample_reference(wide[:, 10:90], *columns)[0]) and not is_bad.any()
    assert torch.equal(wide.nan_to_num(), before.nan_to_num())


PARAMS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(top_k=7),
    "top_p": SamplingParams(temperature=1.3, top_p=0.8),
    "min_p": SamplingParams(temperature=2.0, min_p=0.1),
    "all": SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_reference_gives_the_tokens_of_the_torch_sampler(params: SamplingParams) -> None:
    logits, seeds = 2 * torch.randn(50, 200), [2**64 - 1 - i for i in range(50)]
    sequences = [make_sequence([1], emitted=[2] * (seed % 3), seed=seed, sampling=params) for seed in seeds]
    column = torch.ones(50)
    filters = Filters(params.top_k * column.int(), params.top_p * column, params.min_p * column)
    positions = torch.tensor([seed % 3 for seed in seeds])
    columns = params.temperature * column, seeds_tensor(seeds, torch.device("cpu")), positions
    expected = Sampler().sample(logits.clone(), sequences).collect().token_ids
    assert sample_reference(logits, *columns, filters)[0].tolist() == expected


def test_no_rows_give_no_tokens() -> None:
    token_ids, is_bad = sample(torch.empty(0, 9), *make_columns(0))
    assert token_ids.shape == is_bad.shape == (0,)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits", {"logits": torch.ones(2, 3, 9)}),
        ("logits", {"logits": torch.ones(2, 9).long()}),
        ("logits", {"logits": torch.ones(9, 2).t()}),
        ("temperature", {"temperature": torch.ones(3)}),
        ("seeds", {"seeds": torch.ones(2).int()}),
        ("positions", {"positions": torch.ones(2)}),
        ("top_k", {"filters": Filters(torch.ones(2), torch.ones(2), torch.ones(2))}),
        ("state", {"penalties": make_penalties(2, 8)}),
        ("offsets", {"bias": make_bias(3, 9)}),
    ],
)
def test_wrong_tensor_is_named(name: str, changes: dict[str, object]) -> None:
    integers = torch.ones(2, dtype=torch.int64)
    good = {"logits": torch.ones(2, 9), "temperature": torch.ones(2), "seeds": integers, "positions": integers}
    with pytest.raises(ValueError, match=f"^{name} "):
        sample(**{**good, **changes})  # type: ignore[arg-type]
