"""The runner's memory, settings and independence of what else is in a step."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import ARCHITECTURES, make_checkpoint
from tests.support.steps import Driver, make_runner, mixed, one_after_another
from weft.errors import DecodeError, SettingsError
from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import MIN_SHARED_BLOCKS, find_families
from worker_svc.loaded_model import resolve_device
from worker_svc.memory import MIN_BLOCKS
from worker_svc.runner import Runner
from worker_svc.step_input import StepInput

SEQUENCES = [[(7 * i + 3 * j) % 128 for j in range(length)] for i, length in enumerate((1, 16, 17, 45))]
LENS = [len(sequence) for sequence in SEQUENCES]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_do_not_depend_on_the_schedule(tmp_path: Path, family: str) -> None:
    runner = make_runner(make_checkpoint(tmp_path, family))
    alone = Driver(runner, SEQUENCES, seed=1).play(one_after_another(LENS, 100))
    for seed in range(3):
        batched = Driver(runner, SEQUENCES, seed=seed).play(mixed(LENS, seed))
        for one, other in zip(alone, batched, strict=True):
            # Float32 in another order, at logits of magnitude 10; without AVX-512 one in 6,000 is 5.3e-5 off.
            torch.testing.assert_close(other, one, rtol=0, atol=1e-4)


def test_only_wanted_rows_get_logits_in_the_order_asked_for(tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    driver = Driver(runner, SEQUENCES)
    step = driver.step_input({0: 1, 2: 5, 3: 9})
    every = runner.forward(step)
    wanted = StepInput(**{name: getattr(step, name) for name in step.__slots__} | {"logit_rows": [14, 0, 3]})
    torch.testing.assert_close(runner.forward(wanted), every[[14, 0, 3]])
    none = StepInput(**{name: getattr(step, name) for name in step.__slots__} | {"logit_rows": []})
    assert runner.forward(none).shape == (0, 128)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_last_rows_are_right_where_sequences_share_a_prefix_and_another_is_between(
    tmp_path: Path, kernels: str
) -> None:
    prefix = [(7 * i) % 128 for i in range(MIN_SHARED_BLOCKS * BLOCK_SIZE)]
    sequences = [[*prefix, 1, 2, 3], SEQUENCES[3], [*prefix, 4, 5, 6]]
    runner = make_runner(make_checkpoint(tmp_path), kernels=kernels)
    driver = Driver(runner, sequences)
    driver.block_tables[2][:MIN_SHARED_BLOCKS] = driver.block_tables[0][:MIN_SHARED_BLOCKS]
    driver.step({0: len(prefix), 1: 20})
    driver.num_computed[2] = len(prefix)
    counts = {0: 2, 1: 5, 2: 3}
    assert len(find_families(driver.step_input(counts))) == 2
    found = driver.step_to_ends(counts)
    alone = [Driver(runner, [tokens]).step({0: len(tokens)})[0] for tokens in sequences]
    wanted = torch.stack([alone[i][driver.num_computed[i] - 1] for i in counts])
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_written_elsewhere_continue_the_sequence(tmp_path: Path, dtype: str) -> None:
    folder = make_checkpoint(tmp_path)
    first, second = make_runner(folder, dtype=dtype), make_runner(folder, dtype=dtype)
    assert first.layout == second.layout
    tokens = SEQUENCES[3]
    tables = [[9, 3, 5], [1, 2, 4]]
    expected = forward(first, tokens, tables[0], start=0)[32:]
    blocks = first.read_blocks(tables[0][:2])
    assert [len(block) for block in blocks] == [first.block_bytes] * 2
    second.write_blocks(tables[1][:2], blocks)
    assert second.read_blocks(tables[1][:2]) == blocks
    # Half types round differently in steps of other sizes; the logits are of magnitude 10.
    tolerance = {"float32": 5e-5, "float16": 0.05, "bfloat16": 0.4}[dtype]
    torch.testing.assert_close(forward(second, tokens, tables[1], start=32), expected, rtol=0, atol=tolerance)


def test_copied_block_is_independent_of_its_source(tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    forward(runner, list(range(BLOCK_SIZE)), [3], start=0)
    runner.copy_block(3, 6)
    source, copy, untouched = runner.read_blocks([3, 6, 5])
    assert copy == source != untouched
    forward(runner, [99] * BLOCK_SIZE, [3], start=0)
    assert runner.read_blocks([6]) == [copy]


def test_block_of_another_size_is_refused_and_nothing_written(tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    with pytest.raises(DecodeError, match="1 bytes"):
        runner.write_blocks([0, 1], [b"\x01" * runner.block_bytes, b"\x01"])
    assert runner.read_blocks([0]) == [b"\0" * runner.block_bytes]
    runner.write_blocks([], [])
    assert runner.read_blocks([]) == []


def test_layout_tells_models_and_types_apart(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a")
    layouts = {
        make_runner(folder).layout,
        make_runner(folder, dtype="bfloat16").layout,
        make_runner(make_checkpoint(tmp_path / "b", num_hidden_layers=3)).layout,
        make_runner(make_checkpoint(tmp_path / "c", head_dim=10)).layout,
        make_runner(make_checkpoint(tmp_path / "d", num_key_value_heads=1)).layout,
    }
    assert len(layouts) == 5


def test_kv_budget_is_kept_and_bounds_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path)
    block_bytes = make_runner(folder).block_bytes
    assert block_bytes == 2 * 2 * BLOCK_SIZE * 2 * 8 * 4
    with caplog.at_level(logging.INFO):
        runner = make_runner(folder, kv_memory=7 * block_bytes - 1)
    assert (runner.num_blocks, runner.max_model_len) == (6, 96)
    assert [record.__dict__["kv_tokens"] for record in caplog.records if record.message == "model loaded"] == [96]
    assert make_runner(folder, kv_memory=100 * block_bytes).max_model_len == 256


def test_kv_budget_too_small_for_a_request_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    block_bytes = make_runner(folder).block_bytes
    with pytest.raises(SettingsError, match="kv_memory"):
        make_runner(folder, kv_memory=MIN_BLOCKS * block_bytes - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(SettingsError, match="cuda"):
        resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_cuda_computes_what_the_cpu_does(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, **({"sliding_window": 7} if family == "mistral" else {}))
    expected = Driver(make_runner(folder), SEQUENCES).play(mixed(LENS))
    found = Driver(make_runner(folder, device="cuda"), SEQUENCES).play(mixed(LENS))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=1e-3)


def forward(runner: Runner, tokens: list[int], table: list[int], *, start: int) -> torch.Tensor:
    """Logits of tokens[start:] of one sequence."""
    positions = list(range(start, len(tokens)))
    slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
    rows = list(range(len(positions)))
    return runner.forward(StepInput(tokens[start:], positions, slots, [len(rows)], [len(tokens)], [table], rows))
