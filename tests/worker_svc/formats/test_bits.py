"""Packed fields come out in their order, whatever the strides of the words."""

from __future__ import annotations

import pytest
import torch

from tests.support.quantized_folders import pack
from worker_svc.formats.bits import signed, unpack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (5, 32), (1, 1)])
def test_fields_are_unpacked_from_the_lowest_bits_on(bits: int, shape: tuple[int, int]) -> None:
    values = torch.randint(0, 2**bits, shape)
    words = pack(values.tolist(), bits)
    expected = values.to(torch.uint8)
    assert torch.equal(unpack(words, bits)[:, : shape[1]], expected)
    assert torch.equal(unpack(words.t().contiguous().t(), bits)[:, : shape[1]], expected)


def test_signed_takes_128_off() -> None:
    values = torch.arange(256)
    assert torch.equal(signed(values.to(torch.uint8)).long(), values - 128)
