"""The likeliest token against `argmax`."""

from __future__ import annotations

import pytest
import torch

from worker_svc.cpu_kernels.greedy import greedy


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 32000), (3, 1001), (2, 1024), (2, 2048), (5, 2049), (17, 64)])
def test_the_first_of_the_largest_is_taken(shape: tuple[int, int], num_threads: int) -> None:
    # Few values, so that many are the largest.
    logits = torch.randint(-9, 10, shape).float()
    token_ids, bad_rows = greedy(logits)
    assert token_ids == logits.argmax(1).tolist()
    assert not bad_rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named_and_others_are_exact(value: float) -> None:
    logits = torch.randn(5, 3333)
    expected = logits.argmax(1)
    logits[2, torch.randint(3333, (1,))] = value
    expected[2] = 0
    token_ids, bad_rows = greedy(logits)
    assert (token_ids, bad_rows) == (expected.tolist(), [2])


def test_values_whose_sum_is_infinite_are_finite() -> None:
    token_ids, bad_rows = greedy(torch.tensor([[3e38, 3e38, 3.1e38]]))
    assert (token_ids, bad_rows) == ([2], [])


def test_rows_of_a_larger_tensor_are_read_where_they_are() -> None:
    logits = torch.randn(4, 80)
    assert greedy(logits[:, :77])[0] == logits[:, :77].argmax(1).tolist()


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2).T], ids=["type", "layout"]
)
def test_other_logits_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits"):
        greedy(logits)
