"""From logits to tokens: a pure function of (logits, parameters, seed, position), whatever else is in the batch.

For each sequence, on float32 logits l [V]:

    1. repetition, frequency and presence penalties (`penalties.py`)
    2. logit_bias is added; before `min_tokens`, stop tokens are -inf
    3. temperature 0: argmax. Otherwise l /= temperature, then top_k, top_p over what is left of it, min_p
    4. argmax(l + g) with Gumbel noise g, a function of seed, position and token id (`noise.py`)

The random bits are the same on every device, in every batch and after every recovery. So a draft changes nothing: each
of its tokens is sampled with the noise of its position, as it would be without the draft, and where that gives another
token than the draft says, what comes after is thrown away. Logprobs are log_softmax of the model's own logits, before
all of this.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.messages import ErrorInfo, SamplingParams
from worker_svc.cpu_kernels.greedy import greedy
from worker_svc.cpu_kernels.launch import IS_AVAILABLE
from worker_svc.penalties import Penalties
from worker_svc.sampled_rows import (
    Rows,
    foresee_filtered,
    foresee_full,
    foresee_greedy,
    sample_filtered,
    sample_full,
    sample_greedy,
)
from worker_svc.sequence import Sequence

# Below this a temperature is 0: logits divided by it would lose what tells them apart.
MIN_TEMPERATURE: Final = 1e-5

Logprobs = tuple[float, tuple[int, ...], tuple[float, ...]]
Drafts = Ordered[Ordered[int]]


@dataclass(frozen=True, slots=True)
class Samples:
    """One token for each sequence; that of a sequence in `errors` means nothing."""

    token_ids: list[int]
    logprobs: dict[int, Logprobs]  # by row, of those that ask
    errors: dict[int, ErrorInfo]  # by row


@dataclass(frozen=True, slots=True)
class Sampling:
    """Tokens that were sampled, and may still be on the device."""

    token_ids: Tensor | list[int]  # [B] int64 on the device, or known already
    errors: dict[int, ErrorInfo]
    logprobs: LogprobTensors | None

    def collect(self) -> Samples:
        """Wait for the tokens and read them."""
        logprobs = {} if self.logprobs is None else self.logprobs.collect()
        token_ids = self.token_ids if isinstance(self.token_ids, list) else self.token_ids.tolist()
        return Samples(token_ids, logprobs, self.errors)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Tokens that another model would sample."""

    token_ids: list[int]
    margins: list[float]  # by how much each beat the second best, in logits with noise over the temperature


class Sampler:
    """Keeps the parameters of the last batch as tensors, since the next step's is mostly the same."""

    def __init__(self) -> None:
        self._batch = _Batch.of([], torch.device("cpu"), 0)
        self._last: Tensor | list[int] | None = None

    @property
    def last_token_ids(self) -> Tensor | None:
        """What was sampled last: [B] int64, on the device."""
        return torch.tensor(self._last, dtype=torch.int64) if isinstance(self._last, list) else self._last

    def sample(self, logits: Tensor, sequences: list[Sequence], drafts: Drafts | None = None) -> Sampling:
        """Sample the next token of each sequence, and the one after each token of its draft.

        Args:
            logits: shape [B, V], or with drafts [B + drafted tokens, V], float32; may be overwritten.
            drafts: for each sequence the tokens that are taken for its next ones. A sequence's rows follow each other,
                and each is sampled as it would be if the drafted tokens before it had been sampled.
        """
        batch = self._batch_of(logits, sequences)
        drawn = batch if drafts is None else batch.with_drafts(drafts)
        if drawn.is_greedy(len(logits)) and logits.device.type == "cpu" and IS_AVAILABLE:
            known, bad_rows = greedy(logits)
            self._last = known
            return Sampling(known, _errors(bad_rows), None)
        token_ids, errors, logprobs = _sample(logits, drawn)
        self._last = token_ids
        if drafts is None:
            batch.advance(token_ids)
        return Sampling(token_ids, errors, logprobs)

    @torch.inference_mode()
    def foresee(self, logits: Tensor, sequences: list[Sequence], rows: list[int], offset: int) -> Foreseen:
        """What a draft model would sample where `sample` will be asked later, with the noise that it will take.

        With the same noise two models agree more often than by chance (Daliri, Musco and Suresh 2024, "Coupling without
        Communication and Drafter-Invariant Speculative Decoding"). Penalties and bias are left out.

        Args:
            logits: the draft model's, shape [R, V].
            sequences: as they will be given to `sample`.
            rows: the R of them that are asked about, in order.
            offset: tokens between the last of each sequence and the one to foresee.
        """
        return self._batch_of(logits, sequences).foresee(logits, rows, offset)

    def _batch_of(self, logits: Tensor, sequences: list[Sequence]) -> _Batch:
        batch = self._batch
        if batch.sequences != sequences or batch.has_diverged():
            batch = self._batch = _Batch.of(list(sequences), logits.device, logits.shape[1], self.last_token_ids)
        batch.positions = [sequence.num_output_tokens for sequence in sequences]
        return batch


@torch.inference_mode()
def _sample(logits: Tensor, drawn: _Batch) -> tuple[Tensor, dict[int, ErrorInfo], LogprobTensors | None]:
    """The tokens of all rows, errors of some, and logprobs where they are wanted. `logits` may be overwritten."""
    # One pass that is not finite if any logit is not.
    is_bad = ~torch.isfinite(logits.sum(dim=1))
    errors = _errors(is_bad.nonzero()[:, 0].tolist() if bool(is_bad.any()) else [])
    if errors:
        logits = logits.masked_fill(is_bad[:, None], 0.0)
    raw = logits.clone() if drawn.logprobs and drawn.changes_logits else logits
    drawn.adjust(logits)
    token_ids = drawn.choose(logits)
    return token_ids, errors, look_up_logprobs(raw, token_ids, drawn.logprobs)


def _errors(bad_rows: list[int]) -> dict[int, ErrorInfo]:
    error = WeftError("the model's logits for this sequence are not finite")
    return dict.fromkeys(bad_rows, ErrorInfo.of(error)) if bad_rows else {}


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Logprobs of the rows that ask, still on the device."""

    rows: list[tuple[int, int]]  # (row, k)
    sampled: Tensor  # [rows]
    top_values: Tensor  # [rows, largest k]
    top_ids: Tensor

    def collect(self) -> dict[int, Logprobs]:
        sampled, top_values, top_ids = self.sampled.tolist(), self.top_values.tolist(), self.top_ids.tolist()
        return {
            row: (sampled[i], tuple(top_ids[i][:k]), tuple(top_values[i][:k])) for i, (row, k) in enumerate(self.rows)
        }


def look_up_logprobs(raw: Tensor, token_ids: Tensor, rows: list[tuple[int, int]]) -> LogprobTensors | None:
    """Of the sampled tokens and of the k likeliest.

    Args:
        raw: the model's own logits, [R, V].
        token_ids: what was sampled, [R].
        rows: (row, k) of those that ask.
    """
    if not rows:
        return None
    index = torch.tensor([row for row, _ in rows], device=raw.device)
    values = torch.log_softmax(raw[index], dim=1)
    sampled = values.gather(1, token_ids[index, None])[:, 0]
    top = values.topk(min(max(k for _, k in rows), raw.shape[1]), dim=1)
    return LogprobTensors(rows, sampled, top.values, top.indices)


@dataclass(slots=True)
class _Batch:
    """Rows to be sampled, with their parameters as tensors, in groups that need the same work."""

    sequences: list[Sequence]
    vocab_size: int
    positions: list[int]  # index in the completion of each row's token
    greedy: Rows
    filtered: Rows  # random, with top_k, top_p or min_p
    full: Rows  # random, over all of the vocabulary
    penalized: Penalties | None
    bias: list[tuple[int, int, float]]  # (row, token id, value)
    held_back: list[tuple[int, int, Tensor]]  # (row, min_tokens, stop tokens)
    logprobs: list[tuple[int, int]]  # (row, k)

    @classmethod
    def of(cls, sequences: list[Sequence], device: torch.device, vocab_size: int, last: Tensor | None = None) -> _Batch:
        """One row for each sequence. `last`: the tokens sampled last, of which some may be pending."""
        params = [sequence.sampling for sequence in sequences]
        positions = [sequence.num_output_tokens for sequence in sequences]
        penalized = [row for row, p in enumerate(params) if is_penalized(p)]

        def rows(belongs: Callable[[SamplingParams], bool]) -> Rows:
            chosen = [row for row, p in enumerate(params) if belongs(p)]
            return Rows.of([sequences[row] for row in chosen], chosen, vocab_size, device)

        return cls(
            sequences,
            vocab_size,
            positions,
            greedy=rows(is_greedy),
            filtered=rows(lambda p: not is_greedy(p) and is_filtered(p)),
            full=rows(lambda p: not is_greedy(p) and not is_filtered(p)),
            penalized=Penalties.of(sequences, penalized, vocab_size, device, last) if penalized else None,
            bias=[(row, token, value) for row, p in enumerate(params) for token, value in p.logit_bias.items()],
            held_back=[
                (row, p.min_tokens, _stop_tokens(sequences[row], vocab_size, device))
                for row, p in enumerate(params)
                if positions[row] < p.min_tokens
            ],
            logprobs=[(row, p.logprobs) for row, p in enumerate(params) if p.logprobs is not None],
        )

    def with_drafts(self, drafts: Drafts) -> _Batch:
        """Rows for the tokens after those of each sequence's draft as well."""
        starts = list(accumulate([len(draft) + 1 for draft in drafts], initial=0))
        rows_of = [range(start, end) for start, end in pairwise(starts)]
        return _Batch(
            self.sequences,
            self.vocab_size,
            [self.positions[i] + j for i, rows in enumerate(rows_of) for j in range(len(rows))],
            greedy=self.greedy.spread(rows_of),
            filtered=self.filtered.spread(rows_of),
            full=self.full.spread(rows_of),
            penalized=self.penalized and self.penalized.spread(rows_of, drafts),
            bias=[(row, token, value) for i, token, value in self.bias for row in rows_of[i]],
            held_back=[(row, min_tokens, tokens) for i, min_tokens, tokens in self.held_back for row in rows_of[i]],
            logprobs=[(row, k) for i, k in self.logprobs for row in rows_of[i]],
        )

    @property
    def changes_logits(self) -> bool:
        return bool(self.penalized or self.bias or self.held_back)

    def is_greedy(self, num_rows: int) -> bool:
        """Whether all rows take the likeliest token as it is, and nobody asks how likely that is."""
        return self.greedy.size == num_rows and not self.changes_logits and not self.logprobs

    def has_diverged(self) -> bool:
        """Whether it matters that a sequence went another way than `advance` foresaw, and one did."""
        return self.penalized is not None and any(
            sequence.num_output_tokens != position
            for sequence, position in zip(self.sequences, self.positions, strict=True)
        )

    def adjust(self, logits: Tensor) -> None:
        """Penalties, bias and min_tokens, in place."""
        if self.penalized:
            self.penalized.apply(logits)
        if self.bias:
            rows, tokens, values = zip(*self.bias, strict=True)
            index = torch.tensor([rows, tokens], device=logits.device).unbind(0)
            logits.index_put_(index, torch.tensor(values, dtype=torch.float32, device=logits.device), accumulate=True)
        for row, min_tokens, stop_tokens in self.held_back:
            if self.positions[row] < min_tokens:
                logits[row, stop_tokens] = -torch.inf

    def choose(self, logits: Tensor) -> Tensor:
        """The tokens [R]."""
        chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for rows, choose in ((self.greedy, sample_greedy), (self.filtered, sample_filtered), (self.full, sample_full)):
            if rows.size == len(logits):
                return choose(logits, rows, self.positions)
            if rows.size:
                chosen[rows.index] = choose(logits[rows.index], rows, [self.positions[row] for row in rows.rows])
        return chosen

    def foresee(self, logits: Tensor, rows: list[int], offset: int) -> Foreseen:
        """As `Sampler.foresee`."""
        place = {row: i for i, row in enumerate(rows)}
        rows_of = [range(place[i], place[i] + 1) if i in place else range(0) for i in range(len(self.sequences))]
        positions = [self.positions[row] + offset for row in rows]
        token_ids = torch.empty(len(rows), dtype=torch.int64)
        margins = torch.empty(len(rows))
        kinds = ((self.greedy, foresee_greedy), (self.filtered, foresee_filtered), (self.full, foresee_full))
        for group, foresee in kinds:
            asked = group.spread(rows_of)
            if asked.size:
                found = foresee(logits[asked.index], asked, [positions[row] for row in asked.rows])
                token_ids[asked.index], margins[asked.index] = found
        return Foreseen(token_ids.tolist(), margins.tolist())

    def advance(self, token_ids: Tensor) -> None:
        """Foresee the next step: each sequence is longer by the token that was sampled."""
        self.positions = [position + 1 for position in self.positions]
        if self.penalized:
            self.penalized.count(token_ids)


def _stop_tokens(sequence: Sequence, vocab_size: int, device: torch.device) -> Tensor:
    tokens = sorted(token for token in sequence.stop_ids if token < vocab_size)
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < MIN_TEMPERATURE


def is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def is_penalized(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
