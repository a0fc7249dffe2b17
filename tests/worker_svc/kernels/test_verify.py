import pytest
import torch

from worker_svc.kernels.verify import verify, verify_reference


@pytest.fixture(autouse=True, params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_verify_equals_its_reference(num_rows: int, num_drafts: int) -> None:
    sampled, drafts = (torch.randint(2, (num_rows, width)) for width in (num_drafts + 1, num_drafts))
    counts = torch.randint(num_drafts + 1, (num_rows,))
    for out, expected in zip(verify(sampled, drafts, counts), verify_reference(sampled, drafts, counts), strict=True):
        assert torch.equal(out, expected)


def test_drafts_stand_until_the_first_that_differs() -> None:
    sampled = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    drafts = torch.tensor([[5, 6, 7], [5, 9, 7], [9, 6, 7], [5, 6, 7]])
    num_accepted, token_ids = verify(sampled, drafts, torch.tensor([3, 3, 3, 1]))
    assert num_accepted.tolist() == [3, 1, 0, 1]
    assert token_ids.tolist() == [[5, 6, 7, 8], [5, 6, -1, -1], [5, -1, -1, -1], [5, 6, -1, -1]]


def test_rows_without_drafts_get_their_next_token() -> None:
    num_accepted, token_ids = verify(torch.tensor([[4, 4]]), torch.tensor([[4]]), torch.tensor([0]))
    assert (num_accepted.tolist(), token_ids.tolist()) == ([0], [[4, -1]])


def test_strided_rows_are_read_where_they_are() -> None:
    wide = torch.randint(2, (4, 11))
    sampled, drafts, counts = wide[:, :4], wide[:, 6:9], torch.full((4,), 3)
    expected = verify_reference(sampled.contiguous(), drafts.contiguous(), counts)
    for out, wanted in zip(verify(sampled, drafts, counts), expected, strict=True):
        assert torch.equal(out, wanted)


def test_no_rows_give_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    num_accepted, token_ids = verify(empty.view(0, 4), empty.view(0, 3), empty)
    assert num_accepted.shape == (0,) and token_ids.shape == (0, 4)


@pytest.mark.parametrize(
    ("sampled", "drafts", "counts", "message"),
    [
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), torch.ones(2).long(), r"sampled .* expected \(2, 4\)"),
        (torch.ones(2, 4), torch.ones(2, 3).long(), torch.ones(2).long(), "sampled is torch.float32"),
        (torch.ones(2, 1).long(), torch.ones(2, 0).long(), torch.ones(2).long(), r"expected \[B, K\] with K > 0"),
        (torch.ones(2, 4).long(), torch.ones(3, 2).long().t(), torch.ones(2).long(), "draft_token_ids has stride"),
        (torch.ones(2, 4).long(), torch.ones(2, 3).long(), torch.ones(3).long(), r"num_drafts has shape \(3,\)"),
    ],
)
def test_wrong_tensor_is_named(sampled: torch.Tensor, drafts: torch.Tensor, counts: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(sampled, drafts, counts)
