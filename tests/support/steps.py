"""Drives a `Runner` over known token sequences by any schedule, on scattered blocks of poisoned memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weft import model_folder
from weft.hashing import BLOCK_SIZE
from weft.settings import ModelSettings
from worker_svc.model_options import ModelOptions
from worker_svc.parallel.group import ALONE, Group
from worker_svc.runner import Runner, load_runner
from worker_svc.step_input import StepInput

# Of each step: sequence index -> how many more of its tokens are computed.
Schedule = Iterable[Mapping[int, int]]
# One CPU thread, and a megabyte of KV.
OPTIONS = ModelOptions(device="cpu", dtype="float32", threads=1, kv_memory=2**20)


def make_runner(
    folder: Path,
    *,
    max_model_len: int = 0,
    group: Group = ALONE,
    **changes: Any,
) -> Runner:
    """A runner of `OPTIONS`, but for `changes`."""
    settings = ModelSettings(model=str(folder), max_model_len=max_model_len)
    return load_runner(model_folder.read(settings), replace(OPTIONS, **changes), group=group)


class Driver:
    """Sequences of known tokens, each with blocks scattered over the cache."""

    def __init__(self, runner: Runner, sequences: Sequence[Sequence[int]], *, seed: int = 0) -> None:
        """Fills all KV memory with NaN, so that reading what was not written shows."""
        self.runner = runner
        self.sequences = sequences
        self.num_computed = [0] * len(sequences)
        free = list(range(runner.num_blocks))
        poison = np.full(runner.block_bytes // 4, np.nan, dtype=np.float32).tobytes()
        runner.write_blocks(free, [poison] * len(free))
        random.Random(seed).shuffle(free)
        self.block_tables = [[free.pop() for _ in range(math.ceil(len(s) / BLOCK_SIZE))] for s in sequences]

    def step_input(self, counts: Mapping[int, int]) -> StepInput:
        """The next `counts` tokens of each sequence; logits of all rows."""
        token_ids, positions, slots = [], [], []
        for i, count in counts.items():
            for position in range(self.num_computed[i], self.num_computed[i] + count):
                token_ids.append(self.sequences[i][position])
                positions.append(position)
                slots.append(self.block_tables[i][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        return StepInput(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            query_lens=list(counts.values()),
            seq_lens=[self.num_computed[i] + count for i, count in counts.items()],
            # As an engine would: blocks are handed out as they are needed.
            block_tables=[
                self.block_tables[i][: math.ceil((self.num_computed[i] + n) / BLOCK_SIZE)] for i, n in counts.items()
            ],
            logit_rows=list(range(len(token_ids))),
        )

    def step(self, counts: Mapping[int, int]) -> list[torch.Tensor]:
        """Compute one step. Returns, for each of its sequences, the logits of its rows: [count, V]."""
        logits = self.runner.forward(self.step_input(counts)).clone()
        for i, count in counts.items():
            self.num_computed[i] += count
        return list(torch.split(logits, list(counts.values())))

    def step_to_ends(self, counts: Mapping[int, int]) -> torch.Tensor:
        """Compute one step of which the last row of each sequence has logits: [sequences, V]."""
        step = self.step_input(counts)
        ends = [stop - 1 for stop in accumulate(step.query_lens)]
        logits = self.runner.forward(replace(step, logit_rows=ends)).clone()
        for i, count in counts.items():
            self.num_computed[i] += count
        return logits

    def play(self, schedule: Schedule) -> list[torch.Tensor]:
        """Compute all steps. Returns the logits of every sequence's every token so far: [tokens, V] each."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.sequences]
        for counts in schedule:
            for i, logits in zip(counts, self.step(counts), strict=True):
                parts[i].append(logits)
        return [torch.cat(part) for part in parts]


def one_after_another(lens: Sequence[int], chunk: int) -> Schedule:
    """Each sequence alone, `chunk` tokens a step."""
    for i, length in enumerate(lens):
        for start in range(0, length, chunk):
            yield {i: min(chunk, length - start)}


def mixed(lens: Sequence[int], seed: int = 0) -> Schedule:
    """Steps of some sequences in random order, each with a decode's one token or a chunk of up to 20."""
    rng = random.Random(seed)
    left = list(lens)
    while any(left):
        chosen = [i for i in range(len(lens)) if left[i] and rng.random() < 0.8]
        rng.shuffle(chosen)
        counts = {i: min(left[i], rng.choice((1, 1, 2, 7, 20))) for i in chosen}
        for i, count in counts.items():
            left[i] -= count
        if counts:
            yield counts
