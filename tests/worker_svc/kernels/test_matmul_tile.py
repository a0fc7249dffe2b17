import pytest
import torch

from worker_svc.kernels.matmul_tile import Epilogue, block_tokens, make_counters, narrow_rows, plan_launch
from worker_svc.kernels.tuning import Config

H200 = 132  # multiprocessors
BLOCKS = {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128}


@pytest.mark.parametrize(("out_features", "splits"), [(4096, 8), (6144, 5), (28672, 1), (128256, 1), (64, 16)])
def test_few_tiles_are_split_until_they_fill_the_device(out_features: int, splits: int) -> None:
    launch = plan_launch(1, out_features, 4096, Config(BLOCKS), H200)
    assert launch.splits == splits
    assert launch.grid == (-(-out_features // 64), splits)


@pytest.mark.parametrize("in_features", [1, 127, 128, 129, 640, 4096, 4224, 14336])
@pytest.mark.parametrize("out_features", [64, 1024, 4096])
def test_splits_cover_all_columns_and_none_is_empty(out_features: int, in_features: int) -> None:
    launch = plan_launch(1, out_features, in_features, Config(BLOCKS), H200)
    assert launch.split_size % BLOCKS["BLOCK_K"] == 0
    assert (launch.splits - 1) * launch.split_size < in_features <= launch.splits * launch.split_size


def test_many_tokens_are_not_split() -> None:
    assert plan_launch(65, 64, 4096, Config(BLOCKS | {"SPLITS": 4}), H200).splits == 1


def test_measured_splits_are_taken() -> None:
    assert plan_launch(1, 28672, 4096, Config(BLOCKS | {"SPLITS": 4}), H200).splits == 4


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 64)])
def test_tiles_of_tokens_are_powers_of_two(num_tokens: int, expected: int) -> None:
    assert block_tokens(num_tokens, 64) == expected


@pytest.mark.parametrize(("rows", "expected"), [(128256, 64), (28672, 64), (8192, 32), (4096, 16), (1, 16)])
def test_tiles_get_narrower_for_fewer_rows(rows: int, expected: int) -> None:
    assert narrow_rows(rows, H200) == expected


def test_there_is_a_counter_for_the_narrowest_tile() -> None:
    assert make_counters(33, torch.device("cpu")).tolist() == [0, 0, 0]


def test_epilogue_names_what_has_another_shape() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        Epilogue(torch.ones(3), None).check(2, 4)
    with pytest.raises(ValueError, match=r"residual has shape \(1, 4\), expected \(2, 4\)"):
        Epilogue(None, torch.ones(1, 4)).check(2, 4)
