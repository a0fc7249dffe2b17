"""Gumbel noise from a counter: a function of (seed, index in the completion, token id), on every device the same.

    g = -log(-log(1 - u)),  u from Philox 4x32-10 (Salmon et al. 2011, section 3.3),
    keyed by the choice's seed, with counter (token id // 4, index in the completion, 0, 0)

The token at argmax(logits + g) is a sample of softmax(logits) (Gumbel-max). As the noise of a position is known before
its logits are, it is made for several positions at once where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

# Noise over the whole vocabulary is made for as many positions ahead as give this many values: for few rows the cost
# is that of calling torch a hundred times (V = 4096, one core of a cloud machine, 2025-11: 240 us for one row, 430 us
# for eight).
NOISE_VALUES: Final = 8 * 4096

_MASK: Final = 0xFFFFFFFF
_PHILOX_M: Final = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W: Final = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS: Final = 10

Key = tuple[Tensor, Tensor]  # the low and high 32 bits of seeds: [B, 1] int64


def make_key(seeds: Sequence[int], device: torch.device) -> Key:
    """The seeds of B choices, 64 bits each."""
    low = torch.tensor([seed & _MASK for seed in seeds], dtype=torch.int64, device=device)
    high = torch.tensor([seed >> 32 & _MASK for seed in seeds], dtype=torch.int64, device=device)
    return low[:, None], high[:, None]


class NoiseWindow:
    """The noise of B choices for the next positions of each."""

    def __init__(self, key: Key, vocab_size: int) -> None:
        self._key = key
        self._vocab_size = vocab_size
        self._everyone = list(range(len(key[0])))
        self._ahead = NOISE_VALUES // max(1, len(key[0]) * vocab_size)
        self._first: list[int] = []  # [B]
        self._values: Tensor | None = None  # [W, B, V]: W positions of each from `_first` on

    def take(self, members: list[int], positions: list[int]) -> Tensor:
        """Noise [R, V] for R pairs of a choice and a position."""
        if self._ahead <= 1:
            return full_noise(_of(self._key, members), self._column(positions), self._vocab_size)
        if self._values is None or not self._has(members, positions):
            self._values = self._make(members, positions)
        offsets = [position - self._first[i] for i, position in zip(members, positions, strict=True)]
        if members == self._everyone and len(set(offsets)) == 1:
            return self._values[offsets[0]]
        return self._values[offsets, members]

    def _has(self, members: list[int], positions: list[int]) -> bool:
        width = 0 if self._values is None else len(self._values)
        return all(0 <= position - self._first[i] < width for i, position in zip(members, positions, strict=True))

    def _make(self, members: list[int], positions: list[int]) -> Tensor:
        asked: list[list[int]] = [[] for _ in self._everyone]
        for i, position in zip(members, positions, strict=True):
            asked[i].append(position)
        first = [min(of_one, default=0) for of_one in asked]
        self._first = first
        # Those that ask for several positions at once will use one or two of them and ask for the rest again.
        width = self._ahead + max(max(of_one) - min(of_one) for of_one in asked if of_one)
        steps = torch.arange(width, device=self._key[0].device)[:, None, None]
        return full_noise(self._key, self._column(first) + steps, self._vocab_size)

    def _column(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(positions, dtype=torch.int64, device=self._key[0].device)[:, None]


def _of(key: Key, members: Sequence[int]) -> Key:
    index = torch.tensor(members, dtype=torch.int64, device=key[0].device)
    return key[0][index], key[1][index]


def full_noise(key: Key, positions: Tensor, vocab_size: int) -> Tensor:
    """Noise for all tokens: shape [..., B, V] for positions [..., B, 1] and keys [B, 1]."""
    quads = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=positions.device)
    lanes = torch.stack(noise_bits(key, quads, positions), dim=-1)
    return gumbel(lanes.flatten(-2)[..., :vocab_size])


def candidate_noise(key: Key, positions: Tensor, token_ids: Tensor) -> Tensor:
    """The values of `full_noise` for some tokens only: shape of `token_ids` [B, K], positions and keys [B, 1]."""
    lanes = torch.stack(noise_bits(key, token_ids // 4, positions), dim=-1)
    return gumbel(lanes.gather(-1, (token_ids % 4)[..., None])[..., 0])


def noise_bits(key: Key, quads: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """32 random bits for the four token ids of each of `quads` (token id // 4); shapes broadcast, int64."""
    zero = torch.zeros(1, dtype=torch.int64, device=quads.device)
    return philox((quads, positions, zero, zero), key)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four 32-bit words for each counter and key, all int64 tensors of values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(_PHILOX_ROUNDS):
        # Products wrap to 64 bits; `& _MASK` takes off what the sign and the keys leave above the low 32.
        low0, low1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        next0 = (low1 >> 32) ^ (c1 ^ (k0 + i * _PHILOX_W[0]))
        next2 = (low0 >> 32) ^ (c3 ^ (k1 + i * _PHILOX_W[1]))
        c0, c1, c2, c3 = (word.bitwise_and_(_MASK) for word in (next0, low1, next2, low0))
    # Each word has come to depend on all that went in, so all four have the shape that it broadcasts to.
    return c0, c1, c2, c3


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from 32 random bits each.

    The uniform u is finest near 0, where the large values come from that decide an argmax; it stays below 1.
    """
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
