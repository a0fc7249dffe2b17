"""Which rows of the vocabulary a rank has, and how the logits come together again."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import ThreadGroup, run_ranks
from worker_svc.backends.torch_layers import PlainLinear
from worker_svc.parallel.group import Group
from worker_svc.parallel.linears import GatheredHead, SummedLinear, head_rows


@pytest.mark.parametrize(("num_rows", "size"), [(8, 2), (9, 2), (9, 4), (5, 4), (4, 4), (127, 3)])
def test_all_logits_come_once_and_in_order(num_rows: int, size: int) -> None:
    weight, x = torch.randn(num_rows, 6), torch.randn(3, 6)

    def body(group: ThreadGroup) -> torch.Tensor:
        start, stop = head_rows(num_rows, group.rank, size)
        return GatheredHead(PlainLinear(weight[start:stop], None), num_rows, group)(x)

    # The same products, in a matrix of another shape.
    torch.testing.assert_close(run_ranks(size, body)[0], x @ weight.T, rtol=1e-5, atol=1e-5)


def test_no_rows_give_no_logits() -> None:
    head = GatheredHead(PlainLinear(torch.randn(5, 6), None), 9, Group(0, 2))
    assert head(torch.empty(0, 6)).shape == (0, 9)


def test_ranks_have_as_many_rows_each() -> None:
    assert [head_rows(9, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (6, 9)]


def test_residual_and_bias_count_once() -> None:
    weight, bias, x, residual = torch.randn(5, 6), torch.randn(5), torch.randn(3, 6), torch.randn(3, 5)

    def body(group: ThreadGroup) -> list[torch.Tensor]:
        mine = slice(3 * group.rank, 3 * group.rank + 3)
        linear = SummedLinear(PlainLinear(weight[:, mine], bias if group.rank == 0 else None), group)
        return [linear(x[:, mine]), linear.add(x[:, mine], residual.clone())]

    plain = x @ weight.T + bias
    for found in run_ranks(2, body):
        # Sums in another order.
        torch.testing.assert_close(found, [plain, plain + residual], rtol=1e-5, atol=1e-5)
