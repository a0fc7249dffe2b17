"""Ranks as the processes that they are compute what one computes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.engine_requests import make_request, make_settings
from tests.support.engine_runs import run
from tests.support.steps import Driver, make_runner, mixed
from weft import model_folder
from weft.errors import DecodeError, SettingsError
from weft.hashing import BLOCK_SIZE
from weft.messages import SamplingParams
from weft.model_folder import ModelFolder
from weft.settings import ModelSettings
from worker_svc.engine import Engine
from worker_svc.engine_io import Add
from worker_svc.parallel.leader import ParallelRunner, check_devices
from worker_svc.runner import ModelRunner, Runner

# Each process imports torch, on a machine that may be busy.
pytestmark = pytest.mark.timeout(120)
SEQUENCES = [[(7 * i + 3 * j) % 128 for j in range(length)] for i, length in enumerate((1, 17, 40))]
SCHEDULE = list(mixed([len(sequence) for sequence in SEQUENCES]))
# Sums of other parts of the same products, in float32 and at logits of magnitude 10.
TOLERANCE = {"rtol": 0, "atol": 1e-4}
ARGUMENTS = {"device": "cpu", "dtype": "float32", "kv_memory": 2**20, "threads": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_key_value_heads=4, vocab_size=127)


@pytest.fixture(scope="module")
def folder(path: Path) -> ModelFolder:
    return model_folder.read(ModelSettings(model=str(path)))


@pytest.fixture(scope="module")
def pair(folder: ModelFolder) -> Iterator[ParallelRunner]:
    runner = ParallelRunner(folder, make_settings(tensor_parallel=2, **ARGUMENTS))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def alone(path: Path) -> Runner:
    return make_runner(path)


def greedy(runner: ModelRunner, folder: ModelFolder, overlaps: bool) -> list[list[int]]:
    """What an engine writes after a few prompts that it reads together, and in parts."""
    settings = make_settings(max_num_batched_tokens=30)
    engine = Engine(runner, settings, digest=b"", eos_token_ids=folder.eos_token_ids, overlaps=overlaps)
    rng = random.Random(3)
    prompts = [[rng.randrange(2, 127) for _ in range(length)] for length in (70, 16, 1)]
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    adds = [
        Add(make_request(prompt, request_id=f"r{i}", slots=[i], sampling=sampling, digest=b""))
        for i, prompt in enumerate(prompts)
    ]
    record = run(engine, adds)
    return [record.tokens(f"r{i}", i) for i in range(len(prompts))]


def test_two_ranks_give_the_logits_of_one(pair: ParallelRunner, alone: Runner) -> None:
    for expected, found in zip(
        Driver(alone, SEQUENCES).play(SCHEDULE), Driver(pair, SEQUENCES).play(SCHEDULE), strict=True
    ):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("overlaps", [False, True], ids=["step by step", "one step in flight"])
def test_engine_writes_the_same_text(pair: ParallelRunner, alone: Runner, folder: ModelFolder, overlaps: bool) -> None:
    assert greedy(pair, folder, overlaps) == greedy(alone, folder, overlaps=False)


def test_blocks_of_one_rank_continue_on_two(pair: ParallelRunner, alone: Runner) -> None:
    assert (pair.layout, pair.block_bytes, pair.num_blocks) == (alone.layout, alone.block_bytes, alone.num_blocks)
    first, second = Driver(alone, SEQUENCES[2:]), Driver(pair, SEQUENCES[2:], seed=1)
    first.play([{0: 2 * BLOCK_SIZE}])
    blocks = alone.read_blocks(first.block_tables[0][:2])
    pair.write_blocks(second.block_tables[0][:2], blocks)
    assert pair.read_blocks(second.block_tables[0][:2]) == blocks
    second.num_computed[0] = 2 * BLOCK_SIZE
    torch.testing.assert_close(second.step({0: 8})[0], first.step({0: 8})[0], **TOLERANCE)


def test_many_blocks_are_written_and_copied(pair: ParallelRunner) -> None:
    rng = np.random.default_rng()
    blocks = [rng.bytes(pair.block_bytes) for _ in range(20)]
    pair.write_blocks(list(range(20)), blocks)
    pair.copy_block(19, 40)
    assert pair.read_blocks([*range(20), 40]) == [*blocks, blocks[19]]
    with pytest.raises(DecodeError, match="3 bytes"):
        pair.write_blocks([0, 1], [blocks[1], b"abc"])
    assert pair.read_blocks([0]) == blocks[:1]


def test_heads_that_do_not_divide_are_refused(folder: ModelFolder) -> None:
    with pytest.raises(SettingsError, match="4 KV heads, which 3 ranks"):
        ParallelRunner(folder, make_settings(tensor_parallel=3, **ARGUMENTS))


@pytest.mark.skipif(torch.cuda.device_count() > 62, reason="has that many GPUs")
def test_ranks_need_a_gpu_each() -> None:
    with pytest.raises(
        SettingsError, match=f"64 ranks need a GPU each, and this worker has {torch.cuda.device_count()}"
    ):
        check_devices(torch.device("cuda"), 64)
    check_devices(torch.device("cpu"), 64)
