from collections.abc import Callable
from typing import Any

import pytest
import torch

from worker_svc.kernels.matmul_weight_only import matmul_weight_only
from worker_svc.kernels.packed_weight import pack_weight
from worker_svc.quantization import Int4Weight, Int8Weight, dequantize

pytestmark = pytest.mark.usefixtures("poison", "device_rounding", "device_products")


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.param)


def int4(size: int, in_features: int, group_size: int) -> Int4Weight:
    values = torch.randint(0, 16, (size, in_features), dtype=torch.uint8)
    shape = (size, in_features // group_size)
    # What a checkpoint has: scales in 16 bits.
    return Int4Weight(values, torch.rand(shape).half().float(), torch.randint(0, 16, shape, dtype=torch.uint8))


def int8(size: int, in_features: int, group_size: int) -> Int8Weight:
    values = torch.randint(-128, 128, (size, in_features), dtype=torch.int8)
    return Int8Weight(values, torch.rand(size, in_features // group_size))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("make", [int4, int8])
def test_every_weight_comes_back(make: Callable[[int, int, int], Any], group_size: int) -> None:
    weight = make(70, 256, group_size)
    # 16 columns, wherever they are.
    columns = torch.randperm(256)[:16]
    y = matmul_weight_only(torch.eye(256)[columns], pack_weight(weight))
    torch.testing.assert_close(y, dequantize(weight)[:, columns].t(), rtol=2e-7, atol=0)


@pytest.mark.usefixtures("seed")
def test_int4_field_is_where_the_description_says() -> None:
    weight = int4(128, 256, 128)
    words = pack_weight(weight).words
    row, column = int(torch.randint(128, ())), int(torch.randint(256, ()))
    w, i, r = row % 64 // 16, row % 16 // 8, row % 8
    j, h, c, e = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
    word = int(words[row // 64, column // 64, 32 * w + 4 * r + c, j])
    assert word >> 4 * (i + 2 * h + 4 * e) & 15 == weight.values[row, column]


@pytest.mark.usefixtures("seed")
def test_int8_field_is_where_the_description_says() -> None:
    weight = int8(128, 256, 256)
    words = pack_weight(weight).words
    row, column = int(torch.randint(128, ())), int(torch.randint(256, ()))
    w, i, r = row % 64 // 16, row % 16 // 8, row % 8
    j, h, c, e = column % 32 // 16, column % 16 // 8, column % 8 // 2, column % 2
    word = int(words[row // 64, column // 32, 32 * w + 4 * r + c, 2 * j + h])
    assert word >> 8 * (i + 2 * e) & 255 == int(weight.values[row, column]) & 255


def test_scales_of_int4_keep_twenty_bits() -> None:
    weight = int4(64, 128, 128)
    scales = torch.rand(64, 1) + 1e-3
    packed = pack_weight(Int4Weight(weight.values, scales, weight.zeros))
    kept = (packed.scales & ~15).view(torch.float32).t()
    torch.testing.assert_close(kept, scales, rtol=2**-20, atol=0)
    assert torch.equal(packed.scales.t() & 15, weight.zeros.to(torch.int32))


def test_sizes_are_those_of_the_weight() -> None:
    packed = pack_weight(int4(70, 96, 32))
    assert (packed.out_features, packed.in_features, packed.group_size, packed.num_groups) == (70, 96, 32, 3)
    assert packed.words.shape == (2, 2, 128, 4)
    assert packed.scales.shape == (3, 128)


@pytest.mark.parametrize("group_size", [16, 48, 192])
def test_groups_without_a_kernel_are_named(group_size: int) -> None:
    message = f"groups have {group_size} columns, expected 32, 64, a multiple of 128, or all in one group"
    with pytest.raises(ValueError, match=message):
        pack_weight(int4(8, 2 * group_size, group_size))
