"""One model on one device: weights, KV blocks, and the forward pass of one engine step.

Knows tokens, positions and slots; what they belong to, and why, is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weft.model_folder import ModelFolder


@dataclass(frozen=True, slots=True)
class StepInput:
    """What one step computes: some tokens of each of B sequences, T in all. Prefill and decode are not told apart."""

    token_ids: list[int]  # [T] the tokens this step computes, sequence after sequence
    positions: list[int]  # [T]
    slot_mapping: list[int]  # [T] block_id * BLOCK_SIZE + offset: where each token's K and V go
    query_lens: list[int]  # [B] tokens of each sequence in this step
    seq_lens: list[int]  # [B] its tokens after this step
    block_tables: list[list[int]]  # [B][blocks of the sequence, in order]
    logit_rows: list[int]  # rows of [T] whose logits are wanted


class Runner:
    """A loaded model with its KV cache."""

    vocab_size: int
    num_blocks: int
    max_model_len: int
    block_bytes: int
    device: torch.device
    layout: bytes

    def __init__(
        self,
        folder: ModelFolder,
        *,
        device: str,
        dtype: str,
        kv_memory: int,
        threads: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> None:
        raise NotImplementedError

    def forward(self, step: StepInput) -> torch.Tensor:
        """Compute the step. Returns logits: [len(logit_rows), V] float32, on the device."""
        raise NotImplementedError

    def copy_block(self, source: int, target: int) -> None:
        """Copy all layers of a block (copy-on-write)."""
        raise NotImplementedError

    def read_blocks(self, block_ids: list[int]) -> list[bytes]:
        """Bytes of whole blocks, `block_bytes` each, in the form that `layout` names."""
        raise NotImplementedError

    def write_blocks(self, block_ids: list[int], blocks: list[bytes]) -> None:
        """Put back what `read_blocks` gave, here or in another worker of the same layout."""
        raise NotImplementedError
