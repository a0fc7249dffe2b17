"""A runner without a model, whose KV cache holds token ids.

Its logits are a function of the tokens that it reads back through the block table, so a block that was overwritten,
shared wrongly or not written shows at once as other tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import torch

from weft.columns import pack_u32, unpack_u32
from weft.hashing import BLOCK_SIZE
from worker_svc.sampler import Sampler
from worker_svc.step_input import StepInput

NOTHING = 2**32 - 1


class TokenRunner:
    block_bytes = 4 * BLOCK_SIZE
    layout = b"token ids"
    device = torch.device("cpu")

    def __init__(self, *, vocab_size: int = 64, num_blocks: int = 64, max_model_len: int = 256) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.max_model_len = min(max_model_len, num_blocks * BLOCK_SIZE)
        self.slots = [NOTHING] * (num_blocks * BLOCK_SIZE)
        self.steps: list[StepInput] = []
        self.poisoned: dict[int, float] = {}  # logit by the last token of the sequence it spoils

    def forward(self, step: StepInput, last_tokens: torch.Tensor | None = None) -> torch.Tensor:
        self.steps.append(step)
        for row, source in step.pending:
            assert last_tokens is not None
            step.token_ids[row] = int(last_tokens[source])
        assert len(step.token_ids) == len(step.positions) == len(step.slot_mapping) == sum(step.query_lens)
        assert len(set(step.slot_mapping)) == len(step.slot_mapping)
        for slot, token_id in zip(step.slot_mapping, step.token_ids, strict=True):
            self.slots[slot] = token_id
        owners = [i for i, count in enumerate(step.query_lens) for _ in range(count)]
        assert [step.positions[end - 1] + 1 for end in accumulate(step.query_lens)] == step.seq_lens
        contexts = [self.read(step.block_tables[owners[row]], step.positions[row] + 1) for row in step.logit_rows]
        logits = [self.logits(context) for context in contexts]
        return torch.stack(logits) if logits else torch.empty(0, self.vocab_size)

    def make_sampler(self) -> Sampler:
        return Sampler()

    def read(self, table: Sequence[int], length: int) -> list[int]:
        tokens = [self.slots[table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE] for i in range(length)]
        assert NOTHING not in tokens
        return tokens

    def logits(self, context: Sequence[int]) -> torch.Tensor:
        """[V]: what follows `context`."""
        rng = random.Random(hash(tuple(context)))
        logits = torch.tensor([rng.gauss(0, 2) for _ in range(self.vocab_size)])
        if context[-1] in self.poisoned:
            logits[3] = self.poisoned[context[-1]]
        return logits

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """What greedy sampling gives, without blocks and batches."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(prompt) :]

    def copy_block(self, source: int, target: int) -> None:
        self._put(target, self._get(source))

    def read_blocks(self, block_ids: list[int]) -> list[bytes]:
        return [pack_u32(self._get(block_id)) for block_id in block_ids]

    def write_blocks(self, block_ids: list[int], blocks: list[bytes]) -> None:
        for block_id, data in zip(block_ids, blocks, strict=True):
            self._put(block_id, unpack_u32(data))

    def close(self) -> None:
        pass

    def _get(self, block_id: int) -> list[int]:
        return self.slots[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE]

    def _put(self, block_id: int, tokens: list[int]) -> None:
        self.slots[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE] = tokens
