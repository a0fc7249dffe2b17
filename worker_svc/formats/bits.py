"""Small whole numbers that are packed into words of 32 bits, the first in the lowest bits."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Fields of 4 or 8 bits. `words`: [..., n] int32; returns [..., n * 32 / bits] uint8."""
    # A copy in any case: `contiguous` leaves a last dimension of one word any stride, which no view takes.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def signed(values: torch.Tensor) -> torch.Tensor:
    """`values - 128`, of uint8, as int8: that is to flip the highest bit."""
    return (values ^ 128).view(torch.int8)
