"""Rotary position embedding (Su et al. 2021): each pair of channels turns by position x frequency.

Channels are kept in interleaved pairs (x0, y0, x1, y1, ...), where Hugging Face checkpoints hold all x, then all y:
then a pair is one complex number and turning all heads of q and k is a single multiplication in place, 2-3 times
faster than halves put together again. `interleaved_order` brings weights into that order at load. Since q and k are
ordered alike, their products do not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies of a model; the last three are of Llama 3's scaling and come together."""

    theta: float
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_context: int | None = None


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a token of each pair. Returns: [D/2] float32.

    Without Llama 3's scaling, all are divided by `factor`. With it (Llama 3.1 model card; Hugging Face `llama3`), only
    those that turn less than `low_freq_factor` times within the original context are; above `high_freq_factor` turns
    they stay, and between the two they blend.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    plain = 1.0 / (rope.theta ** (pairs / head_dim))
    if rope.low_freq_factor is None or rope.high_freq_factor is None or rope.original_context is None:
        return plain / rope.factor
    turns = rope.original_context * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return plain * ((1.0 - kept) / rope.factor + kept)


def turns(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Unit complex numbers to turn by. `positions`: [T] int64; returns [T, 1, D/2] complex64."""
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def rotate_(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Turn heads in place. `x`: [T, heads, D], interleaved, last dimension contiguous; `turns`: [T, 1, D/2]."""
    pairs = x.view(*x.shape[:-1], -1, 2)
    if x.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(turns)
        return
    pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turns))


def interleaved_order(num_heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Rows of q or k weights, biases or norms of a checkpoint in the order that `rotate_` wants.

    The first `rotary_dim` channels of each head come as halves and become pairs; the others stay where they are.

    Returns: [heads * D] int64.
    """
    channels = torch.arange(head_dim)
    channels[:rotary_dim] = torch.arange(rotary_dim).view(2, rotary_dim // 2).t().reshape(-1)
    return (torch.arange(num_heads)[:, None] * head_dim + channels).reshape(-1)
