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
class Linear:
    """All frequencies divided by one factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3:
    """Slow frequencies divided by a factor, fast ones kept, those between blended (Llama 3.1 model card)."""

    factor: float
    low_freq_factor: float  # turns within the original context: fewer are divided,
    high_freq_factor: float  # more are kept
    original_context: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """The same blend, in a ramp over the pairs' indices (Peng et al. 2023), and turned vectors grow by a factor."""

    factor: float
    beta_fast: float  # turns within the original context at which the ramp begins
    beta_slow: float  # and ends
    original_context: int
    attention_factor: float
    is_truncated: bool = True  # the ramp begins and ends at whole pairs


@dataclass(frozen=True, slots=True)
class LongRope:
    """Each pair's frequency divided by its own factor (Ding et al. 2024), and turned vectors grow by a factor."""

    factors: tuple[float, ...]
    is_long: bool  # the factors for more than the original context; a model has two lists
    attention_factor: float


Scaling = Linear | Llama3 | Yarn | LongRope


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies of a model or layer: theta^(-2i / P) for pair i of P channels, scaled for longer contexts."""

    theta: float
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """Length of the complex numbers that channels are multiplied by."""
        return getattr(self.scaling, "attention_factor", 1.0)


def frequencies(rope: Rope, rotary_dim: int) -> torch.Tensor:
    """Radians a token of each pair. Returns: [P/2] float32."""
    periods = rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    plain = 1.0 / periods
    match rope.scaling:
        case None:
            return plain
        case Linear(factor):
            return plain / factor
        case Llama3(factor, low, high, context):
            turns = context * plain / (2 * math.pi)
            return _blend(plain, factor, ((turns - low) / (high - low)).clamp(0.0, 1.0))
        case Yarn(factor):
            return _blend(plain, factor, 1.0 - _yarn_ramp(rope.theta, rope.scaling, rotary_dim))
        case LongRope(factors):
            return 1.0 / (torch.tensor(factors) * periods)


def turns(positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float = 1.0) -> torch.Tensor:
    """Complex numbers to turn by. `positions`: [T] int64; returns [T, 1, P/2] complex64."""
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies
    return torch.polar(torch.full_like(angles, attention_factor), angles).unsqueeze(1)


def rotate_(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Turn heads in place. `x`: [T, heads, P], interleaved, last dimension contiguous; `turns`: [T, 1, P/2]."""
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


def _blend(plain: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    """`kept`: of each pair, 1 to keep its frequency, 0 to divide it by the factor."""
    return plain / factor * (1.0 - kept) + plain * kept


def _yarn_ramp(theta: float, yarn: Yarn, rotary_dim: int) -> torch.Tensor:
    """0 for pairs that turn more often than `beta_fast`, 1 for those that turn less often than `beta_slow`: [P/2]."""

    def pair_that_turns(times: float) -> float:
        # The pair with frequency 2 pi times / context, which is theta^(-2i / P); not a whole number.
        return rotary_dim * math.log(yarn.original_context / (2 * math.pi * times)) / (2 * math.log(theta))

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    # A ramp of no width is a step.
    width = last - first or 0.001
    return ((torch.arange(rotary_dim // 2) - first) / width).clamp(0.0, 1.0)
