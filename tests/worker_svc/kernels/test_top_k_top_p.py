import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from worker_svc.kernels.sampling import DEFAULT, sample, sample_reference
from worker_svc.kernels.top_k_top_p import MAX_GROUPS, Filters, filter_reference, group_size
from worker_svc.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("poison")

# Two splits of the vocabularies below, and scans of one to three rounds.
SMALL = Config({"BLOCK": 128, "GROUP": 32, "SCAN": 64}, num_warps=1)
WIDE = Config({"BLOCK": 512, "GROUP": 32, "SCAN": 512}, num_warps=1)


@pytest.fixture(autouse=True, params=[0])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


def make_filters(num_rows: int, top_k: object = 0, top_p: object = 1.0, min_p: object = 0.0) -> Filters:
    return Filters(
        torch.as_tensor(top_k, dtype=torch.int32).expand(num_rows).contiguous(),
        torch.as_tensor(top_p, dtype=torch.float32).expand(num_rows).contiguous(),
        torch.as_tensor(min_p, dtype=torch.float32).expand(num_rows).contiguous(),
    )


def random_filters(num_rows: int, vocab_size: int) -> Filters:
    """Each of the eight combinations in turn."""
    row = torch.arange(num_rows)
    return make_filters(
        num_rows,
        torch.randint(1, vocab_size + 2, (num_rows,)) * (row % 2 == 0),
        torch.where(row // 2 % 2 == 0, 0.02 + 0.97 * torch.rand(num_rows), 1.0),
        torch.rand(num_rows).square() * (row // 4 % 2 == 0),
    )


def draw(logits: torch.Tensor, filters: Filters, config: Config = SMALL) -> torch.Tensor:
    """Tokens of the kernel, which must be those of a sort."""
    num_rows = len(logits)
    columns = torch.ones(num_rows), torch.randint(2**62, (num_rows,)), torch.randint(99, (num_rows,))
    token_ids, is_bad = sample(logits, *columns, filters, config=config)
    assert torch.equal(token_ids, sample_reference(logits, *columns, filters)[0]) and not is_bad.any()
    return token_ids


@pytest.mark.parametrize(("vocab_size", "spread"), [(1, 1.0), (33, 1.0), (129, 0.5), (150, 4.0)])
def test_tokens_are_those_of_a_sort(vocab_size: int, spread: float) -> None:
    draw(spread * torch.randn(8, vocab_size), random_filters(8, vocab_size))


def test_equal_logits_are_kept_in_order_of_their_ids() -> None:
    draw(torch.randint(4, (8, 60)).float(), random_filters(8, 60))


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    assert set(draw(torch.zeros(8, 40), make_filters(8, top_k=2)).tolist()) == {0, 1}


def test_top_p_takes_its_share_of_what_top_k_keeps() -> None:
    # Of the first two, 0.5 and 0.3, the first has 0.625; of all it has less than 0.6.
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(6, -1).contiguous()
    assert set(draw(logits, make_filters(6, top_k=2, top_p=0.6)).tolist()) == {0}
    assert set(draw(logits, make_filters(6, top_p=0.6)).tolist()) == {0, 1}


@pytest.mark.parametrize(
    "filters", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}, {"top_k": 5, "top_p": 1e-30}], ids=str
)
def test_strictest_filters_keep_the_likeliest(filters: dict[str, float]) -> None:
    logits = torch.randn(3, 40)
    assert torch.equal(draw(logits, make_filters(3, **filters)), logits.argmax(dim=1))


def test_what_top_k_keeps_is_weighed_wherever_it_is() -> None:
    # 0.5 and 0.3, and 0.01 for each twentieth token after them: 18 of these belong to the first 20.
    logits = torch.full((8, 400), -50.0)
    logits[:, ::20] = math.log(0.01)
    logits[:, 0], logits[:, 20] = math.log(0.5), math.log(0.3)
    assert set(draw(logits, make_filters(8, top_k=20, top_p=0.4), WIDE).tolist()) == {0}


def test_logits_far_apart_lose_no_token() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, 3e-30], [-1e30, -2e30, -3e30, -1e-30]])
    assert draw(logits, make_filters(2, top_k=2, top_p=0.5)).tolist() == [0, 3]


def test_default_config_gives_the_same() -> None:
    draw(3 * torch.randn(3, 1500), make_filters(3, [40, 0, 7], [0.9, 0.5, 1.0]), DEFAULT)


def test_groups_are_larger_where_there_would_be_too_many() -> None:
    assert [group_size(size, 64) for size in (1, 128256, 64 * MAX_GROUPS, 64 * MAX_GROUPS + 1)] == [64, 64, 64, 128]


def test_reference_keeps_what_transformers_does() -> None:
    for _ in range(20):
        logits = 2 * torch.randn(1, 60)
        top_k, top_p, min_p = int(torch.randint(1, 60, ())), float(torch.rand(())), float(torch.rand(())) * 0.2
        warpers = LogitsProcessorList([TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)])
        expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits).isfinite()
        expected &= MinPLogitsWarper(min_p)(torch.zeros(1, 1, dtype=torch.long), logits).isfinite()
        kept = filter_reference(logits, make_filters(1, top_k, top_p, min_p)).isfinite()
        assert torch.equal(kept, expected), (top_k, top_p, min_p)


def test_reference_keeps_all_when_nothing_is_asked() -> None:
    logits = torch.tensor([[0.0, -80.0, -math.inf, 5.0]])
    assert torch.equal(filter_reference(logits, make_filters(1)), logits)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_wrong_parameter_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has shape"):
        filters = {**dict.fromkeys(("top_k", "top_p", "min_p"), make_filters(3)), name: make_filters(2)}
        Filters(filters["top_k"].top_k, filters["top_p"].top_p, filters["min_p"].min_p).check(3)
