import pytest
import torch

from worker_svc.kernels.tuning import Config
from worker_svc.kernels.verify_rejection import verify_rejection, verify_rejection_reference

pytestmark = pytest.mark.usefixtures("poison")

SMALL = Config({"BLOCK": 64}, num_warps=1)


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(num_rows: int, num_drafts: int, vocab_size: int) -> Inputs:
    """Drafts from a distribution near the target's; rows have any number of them."""
    target = torch.randn(num_rows, num_drafts + 1, vocab_size).softmax(dim=-1)
    drafted = (target[:, :-1].log() + 0.5 * torch.randn(num_rows, num_drafts, vocab_size)).softmax(dim=-1)
    drafts = drafted.flatten(0, 1).multinomial(1).view(num_rows, num_drafts)
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,))
    return target, drafted, drafts, torch.randint(num_drafts + 1, (num_rows,)), seeds, torch.randint(999, (num_rows,))


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 63), (7, 2, 64), (7, 3, 65), (5, 8, 130)], ids=str)
def test_rejection_equals_its_reference(shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(*shape)
    found, expected = verify_rejection(*inputs, SMALL), verify_rejection_reference(*inputs)
    assert torch.equal(found[0], expected[0])
    # Noise differs in its last places; that it decides among 130 tokens has a probability of 1e-5.
    assert torch.equal(found[1], expected[1])


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected).square() / expected).sum())


def test_tokens_have_the_distribution_of_the_target() -> None:
    count, vocab_size = 40000, 5
    target, drafted = torch.randn(3, vocab_size).softmax(-1), torch.randn(2, vocab_size).softmax(-1)
    drafts = torch.stack([row.expand(count, -1).multinomial(1)[:, 0] for row in drafted], dim=1)
    _, token_ids = verify_rejection_reference(
        target.expand(count, -1, -1),
        drafted.expand(count, -1, -1),
        drafts,
        torch.full((count,), 2),
        torch.randint(-(2**63), 2**63 - 1, (count,)),
        torch.full((count,), 7),
    )
    for position in range(3):
        tokens = token_ids[:, position]
        tokens = tokens[tokens >= 0]
        observed = torch.bincount(tokens, minlength=vocab_size)
        # 4 degrees of freedom: above 30 once in 200,000 runs.
        assert chi_square(observed, target[position] * len(tokens)) < 30, f"position {position}"


def test_drafts_of_the_target_itself_all_stand() -> None:
    target, _, drafts, _, seeds, positions = make_inputs(6, 3, 40)
    counts = torch.full((6,), 3)
    num_accepted, token_ids = verify_rejection(target, target[:, :-1].contiguous(), drafts, counts, seeds, positions)
    assert num_accepted.tolist() == [3] * 6
    assert torch.equal(token_ids[:, :3], drafts)


def test_share_of_drafts_that_stand_is_what_p_and_q_share() -> None:
    count = 20000
    target, drafted = torch.randn(20).softmax(-1), torch.randn(20).softmax(-1)
    num_accepted, _ = verify_rejection_reference(
        target.expand(count, 2, -1),
        drafted.expand(count, 1, -1),
        drafted.expand(count, -1).multinomial(1),
        torch.ones(count, dtype=torch.int64),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
    )
    # Five standard deviations of a share of 20,000.
    assert float(num_accepted.float().mean()) == pytest.approx(float(torch.minimum(target, drafted).sum()), abs=0.018)


def test_fallen_draft_is_not_sampled_again() -> None:
    target = torch.tensor([0.0, 0.5, 0.5]).expand(8, 2, -1).contiguous()
    drafted = torch.tensor([1.0, 0.0, 0.0]).expand(8, 1, -1).contiguous()
    zeros = torch.zeros(8, dtype=torch.int64)
    num_accepted, token_ids = verify_rejection(
        target, drafted, zeros[:, None].contiguous(), zeros + 1, torch.arange(8), zeros
    )
    assert num_accepted.tolist() == [0] * 8
    assert set(token_ids[:, 0].tolist()) == {1, 2} and (token_ids[:, 1] == -1).all()


def test_draft_stays_where_rounding_leaves_nothing_else() -> None:
    probabilities = torch.tensor([0.25, 0.75])
    # A draft that falls though p <= q everywhere, as where sums are rounded.
    target, drafted = (0.5 * probabilities).expand(8, 2, -1).contiguous(), probabilities.expand(8, 1, -1).contiguous()
    zeros = torch.zeros(8, dtype=torch.int64)
    inputs = (target, drafted, zeros[:, None] + 1, zeros + 1, torch.arange(8), zeros)
    num_accepted, token_ids = verify_rejection(*inputs)
    assert 0 in num_accepted
    assert (token_ids[num_accepted == 0] == torch.tensor([1, -1])).all()
    assert torch.equal(token_ids, verify_rejection_reference(*inputs)[1])


def test_no_rows_give_no_rows() -> None:
    num_accepted, token_ids = verify_rejection(*make_inputs(0, 2, 5))
    assert num_accepted.shape == (0,) and token_ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "index", "tensor"),
    [
        ("target_probs", 0, torch.ones(2, 1, 9)),
        ("target_probs", 0, torch.ones(2, 4, 9).double()),
        ("target_probs", 0, torch.ones(2, 8, 9)[:, ::2]),
        ("draft_probs", 1, torch.ones(2, 4, 9)),
        ("draft_token_ids", 2, torch.ones(2, 3)),
        ("num_drafts", 3, torch.ones(3).long()),
        ("seeds", 4, torch.ones(2).int()),
        ("positions", 5, torch.ones(1).long()),
    ],
)
def test_wrong_tensor_is_named(name: str, index: int, tensor: torch.Tensor) -> None:
    inputs = list(make_inputs(2, 3, 9))
    inputs[index] = tensor
    with pytest.raises(ValueError, match=f"^{name} "):
        verify_rejection(*inputs)
