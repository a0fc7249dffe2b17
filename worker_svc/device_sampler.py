"""The sampler of a GPU: the rules and the noise of `sampler.py`, in kernels, without waiting for the device.

Tokens are read when someone collects them; until then they feed the next step where they are.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.messages import ErrorInfo, SamplingParams
from worker_svc.kernels.noise import seeds_tensor
from worker_svc.kernels.penalties import Bias, Penalties, count_completion_, count_prompt_
from worker_svc.kernels.sampling import sample
from worker_svc.kernels.top_k_top_p import Filters
from worker_svc.sampler import (
    Drafts,
    Foreseen,
    LogprobTensors,
    Samples,
    is_filtered,
    is_greedy,
    is_penalized,
    look_up_logprobs,
)
from worker_svc.sequence import Sequence

# `until` of a bias that always holds.
ALWAYS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class DeviceSampling:
    """Tokens on the device, on their way to the host."""

    token_ids: Tensor  # [B] int64, on the device
    logprobs: LogprobTensors | None
    host: Tensor  # [2, B] int64: token ids and whether the row's logits were bad; valid after `arrived`
    arrived: torch.cuda.Event | None

    def collect(self) -> Samples:
        """Wait for the tokens and read them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        token_ids, is_bad = self.host.tolist()
        error = ErrorInfo.of(WeftError("the model's logits for this sequence are not finite"))
        errors = {row: error for row, bad in enumerate(is_bad) if bad}
        return Samples(token_ids, {} if self.logprobs is None else self.logprobs.collect(), errors)


class DeviceSampler:
    """Keeps the parameters of the last batch on the device, since the next step's is mostly the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batch: _Batch | None = None
        # [B] int64: what was sampled last.
        self.last_token_ids: Tensor | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence], drafts: Drafts | None = None) -> DeviceSampling:
        """Sample the next token of each sequence, and the one after each token of its draft.

        Args:
            logits: [B, V], or with drafts [B + drafted tokens, V].
            drafts: as `Sampler.sample` wants them.
        """
        batch = self._batch
        if drafts is not None:
            drawn = [
                _Row(s, draft[:i]) for s, draft in zip(sequences, drafts, strict=True) for i in range(len(draft) + 1)
            ]
            batch = self._batch = _Batch(drawn, self._device, logits.shape[1], self.last_token_ids)
        elif batch is None or not batch.is_for(sequences):
            drawn = [_Row(sequence) for sequence in sequences]
            batch = self._batch = _Batch(drawn, self._device, logits.shape[1], self.last_token_ids)
        token_ids, is_bad = sample(
            logits, batch.temperature, batch.seeds, batch.positions, batch.filters, batch.penalties, batch.bias
        )
        self.last_token_ids = token_ids
        logprobs = look_up_logprobs(logits, token_ids, batch.logprobs)
        batch.advance(token_ids)
        return _send(token_ids, is_bad, logprobs)

    @torch.inference_mode()
    def foresee(self, logits: Tensor, sequences: list[Sequence], rows: list[int], offset: int) -> Foreseen:
        """As `Sampler.foresee`, with margins of the likeliest token's logit, without noise."""
        drawn = [_Row(sequences[row], (0,) * offset) for row in rows]
        batch = _Batch(drawn, self._device, logits.shape[1], None)
        token_ids, _ = sample(logits, batch.temperature, batch.seeds, batch.positions, batch.filters)
        top = logits.topk(2, dim=1).values
        return Foreseen(token_ids.tolist(), (top[:, 0] - top[:, 1]).tolist())


def _send(token_ids: Tensor, is_bad: Tensor, logprobs: LogprobTensors | None) -> DeviceSampling:
    both = torch.stack((token_ids, is_bad.to(torch.int64)))
    if not both.is_cuda:
        return DeviceSampling(token_ids, logprobs, both, None)
    host = torch.empty(both.shape, dtype=torch.int64, pin_memory=True)
    host.copy_(both, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
    arrived.record()
    return DeviceSampling(token_ids, logprobs, host, arrived)


@dataclass(frozen=True, slots=True)
class _Row:
    """A token to sample: the next of a sequence, if what is drafted had been sampled before it."""

    sequence: Sequence
    drafted: Ordered[int] = ()

    @property
    def index(self) -> int:
        """Of the token in the completion."""
        return self.sequence.num_output_tokens + len(self.drafted)


@dataclass(slots=True)
class _Batch:
    """Rows to sample with their parameters on the device."""

    rows: list[_Row]
    device: torch.device
    vocab_size: int
    last: Tensor | None  # tokens sampled last, of which some may be pending
    next_indices: list[int] = field(init=False)  # in the completion, of each row's next token
    temperature: Tensor = field(init=False)
    seeds: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    filters: Filters | None = field(init=False)
    penalties: Penalties | None = field(init=False)
    bias: Bias | None = field(init=False)
    logprobs: list[tuple[int, int]] = field(init=False)  # (row, k)

    def __post_init__(self) -> None:
        params = [row.sequence.sampling for row in self.rows]
        self.next_indices = [row.index for row in self.rows]
        self.temperature = self._floats([0.0 if is_greedy(p) else p.temperature for p in params])
        self.seeds = seeds_tensor([row.sequence.seed for row in self.rows], self.device)
        self.positions = torch.tensor(self.next_indices, dtype=torch.int64, device=self.device)
        self.filters = self._filters(params) if any(is_filtered(p) for p in params) else None
        self.penalties = self._penalties(params) if any(is_penalized(p) for p in params) else None
        self.bias = self._bias()
        self.logprobs = [(row, p.logprobs) for row, p in enumerate(params) if p.logprobs is not None]

    def is_for(self, sequences: list[Sequence]) -> bool:
        """Whether these are its sequences, each where `advance` foresaw it."""
        own = [row.sequence for row in self.rows]
        return own == sequences and self.next_indices == [sequence.num_output_tokens for sequence in sequences]

    def advance(self, token_ids: Tensor) -> None:
        """Foresee the next step: each sequence is longer by the token that was sampled."""
        self.next_indices = [index + 1 for index in self.next_indices]
        self.positions += 1
        if self.penalties is not None:
            count_completion_(self.penalties.state, self.penalties.slots, token_ids)

    def _filters(self, params: list[SamplingParams]) -> Filters:
        return Filters(
            top_k=self._integers([p.top_k for p in params]),
            top_p=self._floats([p.top_p for p in params]),
            min_p=self._floats([p.min_p for p in params]),
        )

    def _penalties(self, params: list[SamplingParams]) -> Penalties:
        rows = [row for row, p in enumerate(params) if is_penalized(p)]
        slot_of = {row: slot for slot, row in enumerate(rows)}
        state = torch.zeros((len(rows), self.vocab_size), dtype=torch.int32, device=self.device)
        for slot, row in enumerate(rows):
            self._count(state, slot, self.rows[row])
        return Penalties(
            slots=self._integers([slot_of.get(row, -1) for row in range(len(params))]),
            state=state,
            repetition=self._floats([p.repetition_penalty for p in params]),
            frequency=self._floats([p.frequency_penalty for p in params]),
            presence=self._floats([p.presence_penalty for p in params]),
        )

    def _count(self, state: Tensor, slot: int, row: _Row) -> None:
        """Note what a row has of prompt and completion, a pending token or drafted ones included."""
        sequence = row.sequence
        token_ids = torch.tensor([*sequence.token_ids, *row.drafted], dtype=torch.int64, device=self.device)
        if sequence.num_pending_tokens and self.last is not None:
            token_ids[-1] = self.last[sequence.pending_row]
        slots = torch.full((len(token_ids),), slot, dtype=torch.int32, device=self.device)
        num_prompt = sequence.num_prompt_tokens
        count_prompt_(state, slots[:num_prompt], token_ids[:num_prompt])
        count_completion_(state, slots[num_prompt:], token_ids[num_prompt:])

    def _bias(self) -> Bias | None:
        entries = [self._entries(row) for row in self.rows]
        flat = [entry for row in entries for entry in row]
        if not flat:
            return None
        token_ids, values, until = zip(*flat, strict=True)
        return Bias(
            offsets=self._integers(list(accumulate(map(len, entries), initial=0))),
            token_ids=self._integers(list(token_ids)),
            values=self._floats(list(values)),
            until=self._integers(list(until)),
        )

    def _entries(self, row: _Row) -> list[tuple[int, float, int]]:
        """(token id, value, until) of logit bias, and of stop tokens that `min_tokens` holds back."""
        params, sequence = row.sequence.sampling, row.sequence
        entries = [(token, value, ALWAYS) for token, value in params.logit_bias.items()]
        if row.index < params.min_tokens:
            stops = sorted(token for token in sequence.stop_ids if token < self.vocab_size)
            entries += [(token, -torch.inf, params.min_tokens) for token in stops]
        return entries

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
