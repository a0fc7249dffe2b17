"""Counter-based random numbers inside kernels, bit for bit those of `worker_svc.noise`.

Philox 4x32-10 (Salmon et al. 2011, section 3.3) keyed by a choice's 64-bit seed. The counter is (token id // 4, index
in the completion, stream, 0): one stream for each use, so that no two uses share a bit.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

# Gumbel noise of the tokens' choice (`sampling`), the one that `worker_svc.noise` has.
CHOICE: Final = tl.constexpr(0)
# Of speculation with rejection (`verify`): whether a draft token is accepted, and what takes its place if not.
ACCEPTANCE: Final = tl.constexpr(1)
REPLACEMENT: Final = tl.constexpr(2)


def seeds_tensor(seeds: list[int], device: torch.device) -> torch.Tensor:
    """Seeds below 2^64 as torch has them: the same bits, signed. Returns [len] int64."""
    return torch.tensor([seed - (seed >> 63 << 64) for seed in seeds], dtype=torch.int64, device=device)


@triton.jit
def random_words(seed, quads, position, stream: tl.constexpr):
    """Four random words for each of `quads`.

    Args:
        seed: scalar int64.
        quads: [n] int32, token ids // 4.
        position: [n] or scalar integer.

    Returns:
        Four of [n] uint32.
    """
    counter = tl.zeros_like(quads)
    return tl.philox(seed, quads, counter + position.to(tl.int32), counter + stream, counter)


@triton.jit
def random_bits(seed, quads, position, stream: tl.constexpr):
    """The words of `random_words` in the order of token ids. Returns [4 * n] uint32."""
    words = random_words(seed, quads, position, stream)
    # The inner dimension is that of the outer join.
    lanes = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    return tl.reshape(lanes, (4 * quads.shape[0],))


@triton.jit
def uniform(bits):
    """Numbers in (0, 1), finest near 0; at most 1 - 2^-24. Returns float32."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * (0.5**32), 1 - 0.5**24)


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise, -log(-log(1 - u)), of 32 random bits each. Returns float32."""
    u = uniform(bits)
    # log1p(-u), good to the last places: the logarithm of what 1 - u rounds to, less what was rounded off.
    rest = 1.0 - u
    log_rest = tl.log(rest) - ((rest - 1.0) + u)
    return -tl.log(-log_rest)
