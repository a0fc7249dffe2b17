"""A step's columns on the device, in one buffer that one copy fills.

The buffer may be larger than the step needs: rows and sequences that pad it have slot -1 and no queries, so that one
CUDA graph serves every step up to its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from weft.hashing import BLOCK_SIZE
from worker_svc.backends.backend import Batch
from worker_svc.kernels.varlen import VarlenBatch
from worker_svc.step_input import StepInput


@dataclass(frozen=True, slots=True)
class StepShape:
    """How much a buffer has room for."""

    num_tokens: int  # T
    num_sequences: int  # B
    num_blocks: int  # M, of the longest sequence
    max_query_len: int

    @classmethod
    def of(cls, step: StepInput) -> StepShape:
        return cls(
            len(step.token_ids),
            len(step.query_lens),
            max(-(-length // BLOCK_SIZE) for length in step.seq_lens),
            max(step.query_lens),
        )

    @property
    def num_wide(self) -> int:
        """Elements of 8 bytes."""
        return 3 * self.num_tokens

    @property
    def num_bytes(self) -> int:
        """The wide elements, then those of 4 bytes."""
        return 8 * self.num_wide + 4 * (2 * self.num_sequences + 1 + self.num_sequences * self.num_blocks)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The buffer of one shape."""

    shape: StepShape
    buffer: torch.Tensor  # bytes, on the device

    @classmethod
    def allocate(cls, shape: StepShape, device: torch.device) -> DeviceStep:
        return cls(shape, torch.empty(shape.num_bytes, dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, step: StepInput, last_tokens: torch.Tensor | None, device: torch.device) -> DeviceStep:
        """A buffer that just fits, filled."""
        found = cls.allocate(StepShape.of(step), device)
        found.fill(step, last_tokens)
        return found

    def fill(self, step: StepInput, last_tokens: torch.Tensor | None) -> None:
        """Start the copy of a step that fits to the device, and take its pending tokens from `last_tokens` there."""
        # New memory each time: the device may still read that of the step before. Torch hands it out again when the
        # copy is over.
        host = torch.empty(self.shape.num_bytes, dtype=torch.uint8, pin_memory=self.buffer.is_cuda)
        _write(_columns(self.shape, host), step)
        self.buffer.copy_(host, non_blocking=True)
        if step.pending and last_tokens is not None:
            targets, sources = zip(*step.pending, strict=True)
            token_ids = _columns(self.shape, self.buffer).wide[0]
            token_ids.index_copy_(0, self._index(targets), last_tokens[self._index(sources)])

    def batch(self, logit_rows: Sequence[int] | None) -> Batch:
        """What is in the buffer as the model wants it. `logit_rows`: None for all, those that pad included."""
        columns, shape = _columns(self.shape, self.buffer), self.shape
        token_ids, positions, slots = columns.wide
        attention = VarlenBatch(
            columns.starts, columns.seq_lens, columns.tables, shape.max_query_len, shape.num_blocks * BLOCK_SIZE
        )
        return Batch(token_ids, positions, slots, attention, None if logit_rows is None else self._index(logit_rows))

    def _index(self, rows: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(rows, dtype=torch.int64, pin_memory=self.buffer.is_cuda)
        return index.to(self.buffer.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Views of a buffer, on either side."""

    wide: torch.Tensor  # [3, T] int64: token ids, positions, slots
    starts: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32
    tables: torch.Tensor  # [B, M] int32


def _columns(shape: StepShape, buffer: torch.Tensor) -> _Columns:
    split, count = 8 * shape.num_wide, shape.num_sequences
    wide, narrow = buffer[:split].view(torch.int64), buffer[split:].view(torch.int32)
    return _Columns(
        wide=wide.view(3, shape.num_tokens),
        starts=narrow[: count + 1],
        seq_lens=narrow[count + 1 : 2 * count + 1],
        tables=narrow[2 * count + 1 :].view(count, shape.num_blocks),
    )


def _write(columns: _Columns, step: StepInput) -> None:
    """Fill a host's buffer. In numpy, which takes lists and small slices several times as fast as torch."""
    num_tokens, num_sequences = len(step.token_ids), len(step.query_lens)
    wide = columns.wide.numpy()
    wide[:, :num_tokens] = (step.token_ids, step.positions, step.slot_mapping)
    wide[:2, num_tokens:] = 0
    wide[2, num_tokens:] = -1
    starts, seq_lens, tables = columns.starts.numpy(), columns.seq_lens.numpy(), columns.tables.numpy()
    starts[: num_sequences + 1] = list(accumulate(step.query_lens, initial=0))
    starts[num_sequences + 1 :] = num_tokens
    seq_lens[:num_sequences] = step.seq_lens
    seq_lens[num_sequences:] = 0
    tables.fill(0)
    for row, table in zip(tables, step.block_tables, strict=False):
        row[: len(table)] = table[: len(row)]
