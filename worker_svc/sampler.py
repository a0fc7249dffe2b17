"""From logits to tokens: a pure function of (logits, parameters, seed, position), whatever else is in the batch.

For each sequence, on float32 logits l [V]:

    1. repetition penalty over prompt and completion (Keskar et al. 2019, section 4.1): l > 0 ? l / r : l * r
       frequency and presence penalty over the completion (OpenAI): l -= f * count + p * [count > 0]
    2. logit_bias is added; before `min_tokens`, stop tokens are -inf
    3. temperature 0: argmax. Otherwise l /= temperature, then top_k, top_p over what is left of it, min_p
    4. argmax(l + g), g = -log(-log(1 - u)) with u from Philox 4x32-10 (Salmon et al. 2011, section 3.3), keyed by the
       choice's seed, counter (token id // 4, index in the completion, 0, 0): Gumbel-max sampling

The random bits are the same on every device, in every batch and after every recovery. Logprobs are log_softmax of the
model's own logits, before all of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.messages import ErrorInfo, SamplingParams
from worker_svc.sequence import Sequence

# Below this a temperature is 0: logits divided by it would lose what tells them apart.
MIN_TEMPERATURE: Final = 1e-5
# How many of the likeliest tokens are tried before all are sorted, when top_k, top_p or min_p say few are needed.
FIRST_CANDIDATES: Final = 64
# Noise over the whole vocabulary is made for as many steps ahead as give this many values: for few rows the cost is
# that of calling torch a hundred times (V = 4096, one core of a cloud machine, 2025-11: 240 us for one row, 430 us for
# eight).
NOISE_VALUES: Final = 8 * 4096

_MASK: Final = 0xFFFFFFFF
_PHILOX_M: Final = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W: Final = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS: Final = 10

Logprobs = tuple[float, tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Samples:
    """One token for each sequence; that of a sequence in `errors` means nothing."""

    token_ids: list[int]
    logprobs: dict[int, Logprobs]  # by row, of those that ask
    errors: dict[int, ErrorInfo]  # by row


@dataclass(frozen=True, slots=True)
class Sampling:
    """Tokens that were sampled, and may still be on the device."""

    token_ids: Tensor  # [B] int64, on the device
    errors: dict[int, ErrorInfo]
    logprobs: _LogprobTensors | None

    def collect(self) -> Samples:
        """Wait for the tokens and read them."""
        logprobs = {} if self.logprobs is None else self.logprobs.collect()
        return Samples(self.token_ids.tolist(), logprobs, self.errors)


class Sampler:
    """Keeps the parameters of the last batch as tensors, since the next step's is mostly the same."""

    def __init__(self) -> None:
        self._batch = _Batch([], torch.device("cpu"), 0)
        # [B] int64, on the device: what was sampled last.
        self.last_token_ids: Tensor | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> Sampling:
        """Sample the next token of each sequence.

        Args:
            logits: shape [B, V], float32; may be overwritten.
        """
        batch = self._batch
        if batch.sequences != sequences or batch.has_diverged():
            batch = self._batch = _Batch(list(sequences), logits.device, logits.shape[1], self.last_token_ids)
        # One pass that is not finite if any logit is not.
        is_bad = ~torch.isfinite(logits.sum(dim=1))
        errors = _errors(is_bad)
        if errors:
            logits = logits.masked_fill(is_bad[:, None], 0.0)
        raw = logits.clone() if batch.logprobs and batch.changes_logits else logits
        batch.adjust(logits)
        token_ids = self.last_token_ids = batch.choose(logits)
        logprobs = batch.look_up_logprobs(raw, token_ids)
        batch.advance(token_ids)
        return Sampling(token_ids, errors, logprobs)


def _errors(is_bad: Tensor) -> dict[int, ErrorInfo]:
    if not bool(is_bad.any()):
        return {}
    error = ErrorInfo.of(WeftError("the model's logits for this sequence are not finite"))
    return dict.fromkeys(is_bad.nonzero()[:, 0].tolist(), error)


@dataclass(frozen=True, slots=True)
class _LogprobTensors:
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


@dataclass(slots=True)
class _Batch:
    """Sequences with their parameters as tensors, in groups of rows that need the same work."""

    sequences: list[Sequence]
    device: torch.device
    vocab_size: int
    last: Tensor | None = None  # tokens sampled last, of which some may be pending
    positions: list[int] = field(init=False)  # index in the completion of each row's next token
    greedy: _Rows = field(init=False)
    filtered: _Rows = field(init=False)  # random, with top_k, top_p or min_p
    full: _Rows = field(init=False)  # random, over all of the vocabulary
    penalized: _Penalties | None = field(init=False)
    bias: tuple[Tensor, Tensor, Tensor] | None = field(init=False)  # rows, token ids, values
    held_back: list[tuple[int, int, Tensor]] = field(init=False)  # (row, min_tokens, stop tokens)
    logprobs: list[tuple[int, int]] = field(init=False)  # (row, k)

    def __post_init__(self) -> None:
        params = [sequence.sampling for sequence in self.sequences]
        self.positions = [sequence.num_output_tokens for sequence in self.sequences]
        self.greedy = self._rows(is_greedy)
        self.filtered = self._rows(lambda p: not is_greedy(p) and _is_filtered(p))
        self.full = self._rows(lambda p: not is_greedy(p) and not _is_filtered(p))
        penalized = [row for row, p in enumerate(params) if _is_penalized(p)]
        self.penalized = _Penalties.of(self, penalized) if penalized else None
        self.bias = self._bias(params)
        self.held_back = [
            (row, p.min_tokens, self._stop_tokens(row))
            for row, p in enumerate(params)
            if self.positions[row] < p.min_tokens
        ]
        self.logprobs = [(row, p.logprobs) for row, p in enumerate(params) if p.logprobs is not None]

    @property
    def changes_logits(self) -> bool:
        return bool(self.penalized or self.bias or self.held_back)

    def has_diverged(self) -> bool:
        """Whether a sequence went another way than `advance` foresaw."""
        return any(
            sequence.num_output_tokens != position
            for sequence, position in zip(self.sequences, self.positions, strict=True)
        )

    def adjust(self, logits: Tensor) -> None:
        """Penalties, bias and min_tokens, in place."""
        if self.penalized:
            self.penalized.apply(logits)
        if self.bias:
            rows, token_ids, values = self.bias
            logits.index_put_((rows, token_ids), values, accumulate=True)
        for row, min_tokens, stop_tokens in self.held_back:
            if self.positions[row] < min_tokens:
                logits[row, stop_tokens] = -torch.inf

    def choose(self, logits: Tensor) -> Tensor:
        """The tokens [B]."""
        if self.greedy.is_all:
            return logits.argmax(dim=1)
        positions = torch.tensor(self.positions, dtype=torch.int64, device=self.device)[:, None]
        chosen = torch.empty(len(self.sequences), dtype=torch.int64, device=self.device)
        for rows, choose in ((self.greedy, _greedy), (self.filtered, _sample_filtered), (self.full, _sample_full)):
            if rows.is_all:
                return choose(logits, rows, positions)
            if rows.size:
                chosen[rows.index] = choose(logits[rows.index], rows, positions[rows.index])
        return chosen

    def look_up_logprobs(self, raw: Tensor, token_ids: Tensor) -> _LogprobTensors | None:
        if not self.logprobs:
            return None
        rows = torch.tensor([row for row, _ in self.logprobs], device=self.device)
        values = torch.log_softmax(raw[rows], dim=1)
        sampled = values.gather(1, token_ids[rows, None])[:, 0]
        top = values.topk(min(max(k for _, k in self.logprobs), self.vocab_size), dim=1)
        return _LogprobTensors(self.logprobs, sampled, top.values, top.indices)

    def advance(self, token_ids: Tensor) -> None:
        """Foresee the next step: each sequence is longer by the token that was sampled."""
        self.positions = [position + 1 for position in self.positions]
        if self.penalized:
            self.penalized.count(token_ids)

    def tokens_of(self, sequence: Sequence) -> Tensor:
        """Prompt and completion on the device, a pending token included."""
        ids = torch.tensor(sequence.token_ids, dtype=torch.int64, device=self.device)
        if sequence.num_pending_tokens and self.last is not None:
            ids[-1] = self.last[sequence.pending_row]
        return ids

    def _rows(self, belongs: Callable[[SamplingParams], bool]) -> _Rows:
        rows = [row for row, sequence in enumerate(self.sequences) if belongs(sequence.sampling)]
        params = [self.sequences[row].sampling for row in rows]
        seeds = [self.sequences[row].seed for row in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)[:, None]

        return _Rows(
            size=len(rows),
            is_all=len(rows) == len(self.sequences),
            index=integers(rows)[:, 0],
            temperature=column([p.temperature for p in params]),
            top_k=integers([p.top_k or self.vocab_size for p in params]),
            # Beyond 1, so that rounding in a sum that should be 1 cuts nothing off.
            top_p=column([p.top_p if p.top_p < 1 else 2.0 for p in params]),
            log_min_p=column([p.min_p for p in params]).log(),
            key=(integers([seed & _MASK for seed in seeds]), integers([seed >> 32 & _MASK for seed in seeds])),
        )

    def _bias(self, params: list[SamplingParams]) -> tuple[Tensor, Tensor, Tensor] | None:
        entries = [(row, token, value) for row, p in enumerate(params) for token, value in p.logit_bias.items()]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        return (
            torch.tensor(rows, device=self.device),
            torch.tensor(tokens, device=self.device),
            torch.tensor(values, dtype=torch.float32, device=self.device),
        )

    def _stop_tokens(self, row: int) -> Tensor:
        tokens = sorted(token for token in self.sequences[row].stop_ids if token < self.vocab_size)
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)


@dataclass(slots=True)
class _Rows:
    """Rows of a batch and their parameters; columns are [size, 1]."""

    size: int
    is_all: bool
    index: Tensor  # [size] rows of the batch
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    key: tuple[Tensor, Tensor]
    noise: list[Tensor] = field(default_factory=list)  # [size, V] for each of the next steps, the last first

    def next_noise(self, positions: Tensor, vocab_size: int) -> Tensor:
        """Noise [size, V] for this step. Called once a step, with positions [size, 1] that grow by one."""
        if not self.noise:
            ahead = max(1, NOISE_VALUES // (self.size * vocab_size))
            steps = torch.arange(ahead, device=positions.device)[:, None, None]
            self.noise.extend(full_noise(self.key, positions + steps, vocab_size).flip(0).unbind(0))
        return self.noise.pop()

    def select(self, index: Tensor) -> _Rows:
        """Some of these rows."""
        return _Rows(
            size=len(index),
            is_all=False,
            index=self.index[index],
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            log_min_p=self.log_min_p[index],
            key=(self.key[0][index], self.key[1][index]),
        )


@dataclass(frozen=True, slots=True)
class _Penalties:
    """Which tokens the penalized rows have seen: P rows of the batch."""

    index: Tensor  # [P]
    repetition: Tensor  # [P, 1]
    frequency: Tensor  # [P, 1]
    presence: Tensor  # [P, 1]
    is_seen: Tensor  # [P, V] bool, in prompt or completion
    counts: Tensor  # [P, V] float32, in the completion

    @classmethod
    def of(cls, batch: _Batch, rows: list[int]) -> _Penalties:
        sequences = [batch.sequences[row] for row in rows]
        shape = (len(rows), batch.vocab_size)
        is_seen = torch.zeros(shape, dtype=torch.bool, device=batch.device)
        counts = torch.zeros(shape, dtype=torch.float32, device=batch.device)
        for i, sequence in enumerate(sequences):
            ids = batch.tokens_of(sequence)
            is_seen[i, ids] = True
            output = ids[sequence.num_prompt_tokens :]
            counts[i].index_add_(0, output, torch.ones(len(output), device=batch.device))

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=batch.device)[:, None]

        return cls(
            index=torch.tensor(rows, device=batch.device),
            repetition=column([s.sampling.repetition_penalty for s in sequences]),
            frequency=column([s.sampling.frequency_penalty for s in sequences]),
            presence=column([s.sampling.presence_penalty for s in sequences]),
            is_seen=is_seen,
            counts=counts,
        )

    def apply(self, logits: Tensor) -> None:
        rows = logits[self.index]
        repeated = torch.where(rows > 0, rows / self.repetition, rows * self.repetition)
        rows = torch.where(self.is_seen, repeated, rows)
        logits[self.index] = rows - self.frequency * self.counts - self.presence * (self.counts > 0)

    def count(self, token_ids: Tensor) -> None:
        new = token_ids[self.index, None]
        self.is_seen.scatter_(1, new, True)
        self.counts.scatter_add_(1, new, torch.ones_like(new, dtype=torch.float32))


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < MIN_TEMPERATURE


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _is_penalized(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _greedy(logits: Tensor, rows: _Rows, positions: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def _sample_full(logits: Tensor, rows: _Rows, positions: Tensor) -> Tensor:
    noise = rows.next_noise(positions, logits.shape[1])
    return (logits / rows.temperature).add_(noise).argmax(dim=1)


def _sample_filtered(logits: Tensor, rows: _Rows, positions: Tensor) -> Tensor:
    # Few rows take their noise from that of the whole vocabulary, which is made for several steps at once.
    is_small = 2 * rows.size * logits.shape[1] <= NOISE_VALUES
    noise = rows.next_noise(positions, logits.shape[1]) if is_small else None
    return _sample_candidates(logits / rows.temperature, rows, positions, noise, FIRST_CANDIDATES)


def _sample_candidates(logits: Tensor, rows: _Rows, positions: Tensor, noise: Tensor | None, size: int) -> Tensor:
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


def filter_candidates(logits: Tensor, rows: _Rows, size: int) -> tuple[Tensor, Tensor, Tensor]:
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


def full_noise(key: tuple[Tensor, Tensor], positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise for all tokens: shape [..., B, V] for positions [..., B, 1] and keys [B, 1]."""
    quads = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=positions.device)
    lanes = torch.stack(noise_bits(key, quads, positions), dim=-1)
    return gumbel(lanes.flatten(-2)[..., :vocab_size])


def candidate_noise(key: tuple[Tensor, Tensor], positions: Tensor, token_ids: Tensor) -> Tensor:
    """The values of `full_noise` for some tokens only: shape of `token_ids` [B, K], positions and keys [B, 1]."""
    lanes = torch.stack(noise_bits(key, token_ids // 4, positions), dim=-1)
    return gumbel(lanes.gather(-1, (token_ids % 4)[..., None])[..., 0])


def noise_bits(key: tuple[Tensor, Tensor], quads: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """32 random bits for the four token ids of each of `quads` (token id // 4); shapes broadcast, int64."""
    zero = torch.zeros(1, dtype=torch.int64, device=quads.device)
    return philox((quads, positions, zero, zero), key)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
