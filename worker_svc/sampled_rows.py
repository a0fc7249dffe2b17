"""Rows of logits that are sampled by the same rule: greedy, over all of the vocabulary, or over what filters leave.

See `sampler.py`, which makes these rows, for the rule itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from worker_svc.noise import NOISE_VALUES, Key, NoiseWindow, candidate_noise, make_key
from worker_svc.sequence import Sequence

# How many of the likeliest tokens are tried before all are sorted, when top_k, top_p or min_p say few are needed.
FIRST_CANDIDATES: Final = 64


@dataclass(slots=True)
class Rows:
    """Some rows of a batch and their parameters; columns are [size, 1]."""

    size: int
    rows: list[int]  # of the batch
    index: Tensor  # [size] the same on the device
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    key: Key
    noise: NoiseWindow
    members: list[int]  # whose noise of the window each row takes

    @classmethod
    def of(cls, sequences: list[Sequence], rows: list[int], vocab_size: int, device: torch.device) -> Rows:
        params = [sequence.sampling for sequence in sequences]

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        key = make_key([sequence.seed for sequence in sequences], device)
        return cls(
            size=len(rows),
            rows=rows,
            index=torch.tensor(rows, dtype=torch.int64, device=device),
            temperature=column([p.temperature for p in params]),
            top_k=column([p.top_k or vocab_size for p in params], torch.int64),
            # Beyond 1, so that rounding in a sum that should be 1 cuts nothing off.
            top_p=column([p.top_p if p.top_p < 1 else 2.0 for p in params]),
            log_min_p=column([p.min_p for p in params]).log(),
            key=key,
            noise=NoiseWindow(key, vocab_size),
            members=list(range(len(rows))),
        )

    def spread(self, rows_of: list[range]) -> Rows:
        """The same with several rows for each: `rows_of[i]` instead of row i."""
        if not self.size:
            return self
        members = [member for member, row in enumerate(self.rows) for _ in rows_of[row]]
        rows = [new for row in self.rows for new in rows_of[row]]
        spread = self.select(torch.tensor(members, dtype=torch.int64, device=self.index.device))
        spread.rows, spread.members = rows, members
        spread.index = torch.tensor(rows, dtype=torch.int64, device=self.index.device)
        return spread

    def select(self, index: Tensor) -> Rows:
        """Some of these rows; without `rows` and `members`, which nobody asks for then."""
        return Rows(
            size=len(index),
            rows=[],
            index=self.index[index],
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            log_min_p=self.log_min_p[index],
            key=(self.key[0][index], self.key[1][index]),
            noise=self.noise,
            members=[],
        )


def sample_greedy(logits: Tensor, rows: Rows, positions: list[int]) -> Tensor:
    return logits.argmax(dim=1)


def sample_full(logits: Tensor, rows: Rows, positions: list[int]) -> Tensor:
    noise = rows.noise.take(rows.members, positions)
    return (logits / rows.temperature).add_(noise).argmax(dim=1)


def sample_filtered(logits: Tensor, rows: Rows, positions: list[int]) -> Tensor:
    # Few rows take their noise from that of the whole vocabulary, which is made for several steps at once.
    is_small = 2 * rows.size * logits.shape[1] <= NOISE_VALUES
    noise = rows.noise.take(rows.members, positions) if is_small else None
    column = torch.tensor(positions, dtype=torch.int64, device=logits.device)[:, None]
    return _sample_candidates(logits / rows.temperature, rows, column, noise, FIRST_CANDIDATES)


def _sample_candidates(logits: Tensor, rows: Rows, positions: Tensor, noise: Tensor | None, size: int) -> Tensor:
    """Sample among the `size` likeliest tokens; rows for which these are too few try again with more."""
    values, token_ids, is_found = filter_candidates(logits, rows, size)
    drawn = candidate_noise(rows.key, positions, token_ids) if noise is None else noise.gather(1, token_ids)
    chosen = token_ids.gather(1, (values + drawn).argmax(dim=1, keepdim=True))[:, 0]
    if not bool(is_found.all()):
        rest = (~is_found).nonzero()[:, 0]
        chosen[rest] = _sample_candidates(
            logits[rest], rows.select(rest), positions[rest], None if noise is None else noise[rest], 8 * size
        )
    return chosen


def filter_candidates(logits: Tensor, rows: Rows, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the tokens that top_k, then top_p, then min_p allow, at least one.

    All three keep a prefix of the tokens sorted by likelihood, so it is enough to look at the `size` likeliest, if the
    prefix ends within them.

    Args:
        logits: shape [B, V], float32, divided by the temperature.

    Returns:
        Logits [B, K] of the likeliest tokens, likeliest first, -inf for those not kept; their token ids [B, K]; and
        [B] whether those kept are all that should be.
    """
    vocab_size = logits.shape[1]
    values, token_ids = logits.topk(min(size, vocab_size), dim=1)
    is_limited, is_complete = rows.top_k < vocab_size, rows.top_k <= size
    values = values.masked_fill(torch.arange(values.shape[1], device=logits.device)[None] >= rows.top_k, -torch.inf)
    log_norm = torch.where(is_limited, values.logsumexp(dim=1, keepdim=True), logits.logsumexp(dim=1, keepdim=True))
    likelihood = (values - log_norm).exp()
    before = likelihood.cumsum(dim=1) - likelihood
    # Nothing is before the likeliest, whatever rounding says.
    before[:, 0] = 0
    is_kept = (before < rows.top_p) & (values >= values[:, :1] + rows.log_min_p)
    is_found = torch.where(is_limited, is_complete, ~is_kept[:, -1:])[:, 0] | (size >= vocab_size)
    return values.masked_fill(~is_kept, -torch.inf), token_ids, is_found


def foresee_greedy(logits: Tensor, rows: Rows, positions: list[int]) -> tuple[Tensor, Tensor]:
    """The token [size] that would be sampled, and by how much its score beats the second best."""
    return _best_two(logits)


def foresee_full(logits: Tensor, rows: Rows, positions: list[int]) -> tuple[Tensor, Tensor]:
    """As `foresee_greedy`, scores being logits over the temperature with noise."""
    return _best_two((logits / rows.temperature).add_(rows.noise.take(rows.members, positions)))


def foresee_filtered(logits: Tensor, rows: Rows, positions: list[int]) -> tuple[Tensor, Tensor]:
    """As `foresee_full`, of the likeliest tokens: where filters leave more than these, it may be another token."""
    noise = rows.noise.take(rows.members, positions)
    values, token_ids, _ = filter_candidates(logits / rows.temperature, rows, FIRST_CANDIDATES)
    best, margins = _best_two(values + noise.gather(1, token_ids))
    return token_ids.gather(1, best[:, None])[:, 0], margins


def _best_two(scores: Tensor) -> tuple[Tensor, Tensor]:
    top = scores.topk(2, dim=1)
    return top.indices[:, 0], top.values[:, 0] - top.values[:, 1]
