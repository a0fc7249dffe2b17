"""Repetition, frequency and presence penalties, and what each penalized sequence has seen.

On logits l, with r, f and p of the request and what its tokens so far are:

    l = l > 0 ? l / r : l * r   for tokens in prompt or completion (Keskar et al. 2019, section 4.1)
    l -= f * count + p * [count > 0]   by tokens of the completion (OpenAI)
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_svc.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Penalties:
    """P penalized rows of a batch, and which tokens they have seen."""

    rows: list[int]  # [P]
    index: Tensor  # [P] the same on the device
    repetition: Tensor  # [P, 1]
    frequency: Tensor  # [P, 1]
    presence: Tensor  # [P, 1]
    is_seen: Tensor  # [P, V] bool, in prompt or completion
    counts: Tensor  # [P, V] float32, in the completion

    @classmethod
    def of(
        cls,
        sequences: Ordered[Sequence],
        rows: list[int],
        vocab_size: int,
        device: torch.device,
        last: Tensor | None,
    ) -> Penalties:
        """Those of the sequences that are in `rows`. `last`: the tokens sampled last, of which some may be pending."""
        params = [sequences[row].sampling for row in rows]
        is_seen = torch.zeros((len(rows), vocab_size), dtype=torch.bool, device=device)
        counts = torch.zeros((len(rows), vocab_size), dtype=torch.float32, device=device)
        for i, row in enumerate(rows):
            token_ids = _tokens_of(sequences[row], device, last)
            is_seen[i, token_ids] = True
            completion = token_ids[sequences[row].num_prompt_tokens :]
            counts[i].index_add_(0, completion, torch.ones(len(completion), device=device))

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        return cls(
            rows=rows,
            index=torch.tensor(rows, device=device),
            repetition=column([p.repetition_penalty for p in params]),
            frequency=column([p.frequency_penalty for p in params]),
            presence=column([p.presence_penalty for p in params]),
            is_seen=is_seen,
            counts=counts,
        )

    def spread(self, rows_of: Ordered[range], drafts: Ordered[Ordered[int]]) -> Penalties:
        """The same with several rows for each: `rows_of[i]` for row i, each after one more token of `drafts[i]`."""
        device = self.index.device
        rows = [new for row in self.rows for new in rows_of[row]]
        members = torch.tensor([i for i, row in enumerate(self.rows) for _ in rows_of[row]], device=device)
        is_seen, counts = self.is_seen[members], self.counts[members]
        start = 0
        for row in self.rows:
            for j, token_id in enumerate(drafts[row]):
                after = slice(start + j + 1, start + len(rows_of[row]))
                is_seen[after, token_id] = True
                counts[after, token_id] += 1
            start += len(rows_of[row])
        return Penalties(
            rows=rows,
            index=torch.tensor(rows, device=device),
            repetition=self.repetition[members],
            frequency=self.frequency[members],
            presence=self.presence[members],
            is_seen=is_seen,
            counts=counts,
        )

    def apply(self, logits: Tensor) -> None:
        """In place, on the batch's logits [R, V]."""
        rows = logits[self.index]
        repeated = torch.where(rows > 0, rows / self.repetition, rows * self.repetition)
        rows = torch.where(self.is_seen, repeated, rows)
        logits[self.index] = rows - self.frequency * self.counts - self.presence * (self.counts > 0)

    def count(self, token_ids: Tensor) -> None:
        """Take in the tokens [R] that the batch's rows got. Mutates: `is_seen` and `counts`."""
        new = token_ids[self.index, None]
        self.is_seen.scatter_(1, new, True)
        self.counts.scatter_add_(1, new, torch.ones_like(new, dtype=torch.float32))


def _tokens_of(sequence: Sequence, device: torch.device, last: Tensor | None) -> Tensor:
    """Prompt and completion, a pending token included."""
    token_ids = torch.tensor(sequence.token_ids, dtype=torch.int64, device=device)
    if sequence.num_pending_tokens and last is not None:
        token_ids[-1] = last[sequence.pending_row]
    return token_ids
