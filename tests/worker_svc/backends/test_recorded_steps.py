"""Steps that are replayed compute what launching their kernels one by one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.steps import Driver, make_runner
from weft.hashing import BLOCK_SIZE
from worker_svc.attention_plan import MIN_SHARED_BLOCKS
from worker_svc.backends.backend import Batch
from worker_svc.backends.recorded_steps import RecordedSteps
from worker_svc.cpu_kernels.inputs import embed
from worker_svc.cpu_kernels.rms_norm import RmsNorm
from worker_svc.cpu_kernels.rows import take_rows
from worker_svc.runner import MAX_RECORDED_ENDS, Runner
from worker_svc.step_input import StepInput

RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_with_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral_with_windows": ("mistral", {"sliding_window": 7}),
    "qwen2_with_windows_in_one_layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
}
OTHERS = ("mixtral", "qwen3_moe", "gemma2", "gemma3_text", "deepseek_v2")


@dataclass
class Replays:
    """Which steps were replayed, and whether any may be."""

    are_allowed: bool = True
    replayed: list[bool] = field(default_factory=list)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    known, real = Replays(), RecordedSteps.replay

    def replay(self: RecordedSteps, step: StepInput, last_tokens: torch.Tensor | None) -> torch.Tensor | None:
        logits = real(self, step, last_tokens) if known.are_allowed else None
        known.replayed.append(logits is not None)
        return logits

    monkeypatch.setattr(RecordedSteps, "replay", replay)
    return known


def drive(runner: Runner, num_sequences: int) -> Driver:
    """Sequences of several lengths, of which the last token is still to be computed."""
    lens = [2 + 5 * i % 37 for i in range(num_sequences)]
    driver = Driver(runner, [[(7 * i + 3 * j) % 128 for j in range(length)] for i, length in enumerate(lens)])
    for i, length in enumerate(lens):
        driver.step({i: length - 1})
    return driver


def decode(driver: Driver) -> StepInput:
    return driver.step_input(dict.fromkeys(range(len(driver.sequences)), 1))


def chunks(tmp_path: Path, counts: dict[int, int], window: int | None) -> tuple[StepInput, Runner]:
    """More tokens of sequences that have some already."""
    # Heads of as many channels as the tiles of chunks take.
    runner = make_runner(make_checkpoint(tmp_path, "mistral", sliding_window=window, head_dim=32), kv_memory=2**22)
    driver = drive(runner, 4)
    driver.sequences = [[*tokens, *range(40)] for tokens in driver.sequences]
    for table in driver.block_tables:
        table += [block for block in range(100) if all(block not in other for other in driver.block_tables)][:3]
    return driver.step_input(counts), runner


def check_same(runner: Runner, step: StepInput, replays: Replays, last_tokens: torch.Tensor | None = None) -> None:
    """Logits and the whole cache, bit by bit."""
    every = list(range(runner.num_blocks))
    before = runner.read_blocks(every)
    replays.are_allowed = False
    launched = runner.forward(step, last_tokens).clone()
    written = runner.read_blocks(every)
    assert written != before
    runner.write_blocks(every, before)
    replays.are_allowed = True
    assert runner.forward(step, last_tokens).equal(launched) and launched.isfinite().all()
    assert replays.replayed[-2:] == [False, True]
    assert runner.read_blocks(every) == written


@pytest.mark.parametrize("num_rows", [1, 3, MAX_RECORDED_ENDS])
@pytest.mark.parametrize("name", RECORDED)
def test_replayed_steps_are_those_launched(tmp_path: Path, replays: Replays, name: str, num_rows: int) -> None:
    family, changes = RECORDED[name]
    runner = make_runner(make_checkpoint(tmp_path, family, **changes), kv_memory=2**21)
    check_same(runner, decode(drive(runner, num_rows)), replays)


def test_one_size_after_another_is_that_launched(tmp_path: Path, replays: Replays) -> None:
    runner = make_runner(make_checkpoint(tmp_path, "mistral", sliding_window=7), kv_memory=2**21)
    for num_rows in (9, 2, 30, 1, 9):
        check_same(runner, decode(drive(runner, num_rows)), replays)


def test_pending_tokens_are_those_sampled_last(tmp_path: Path, replays: Replays) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    step = decode(drive(runner, 4))
    last_tokens = torch.tensor([99, step.token_ids[2], 98, step.token_ids[0]])
    token_ids = [0, step.token_ids[1], 0, step.token_ids[3]]
    waiting = replace(step, token_ids=token_ids, pending=[(0, 3), (2, 1)])
    check_same(runner, waiting, replays, last_tokens)
    known = runner.forward(step).clone()
    assert runner.forward(waiting, last_tokens).equal(known)
    assert not runner.forward(replace(waiting, pending=[(0, 0), (2, 2)]), last_tokens)[[0, 2]].equal(known[[0, 2]])


def test_recording_is_made_anew_for_another_cache(tmp_path: Path, replays: Replays) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    check_same(runner, decode(drive(runner, 3)), replays)
    for num_blocks in (20, 200):
        runner.resize(num_blocks)
        check_same(runner, decode(drive(runner, 3)), replays)


@pytest.mark.parametrize("counts", [{0: 1, 1: 5}, {2: 20}, {0: 3, 1: 1, 3: 30}], ids=str)
@pytest.mark.parametrize("window", [None, 7])
def test_chunks_of_which_all_logits_are_wanted_are_those_launched(
    tmp_path: Path, replays: Replays, counts: dict[int, int], window: int | None
) -> None:
    step, runner = chunks(tmp_path, counts, window)
    check_same(runner, step, replays)


def test_all_logits_may_be_wanted_in_any_order(tmp_path: Path, replays: Replays) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    step = decode(drive(runner, 3))
    every = runner.forward(step).clone()
    assert runner.forward(replace(step, logit_rows=[2, 0, 1])).equal(every[[2, 0, 1]])
    assert replays.replayed[-1]


@pytest.mark.parametrize("wanted", [[0], [2], [0, 2], []], ids=str)
def test_steps_of_which_some_logits_are_wanted_are_those_launched(
    tmp_path: Path, replays: Replays, wanted: list[int]
) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    step = decode(drive(runner, 3))
    every = runner.forward(step).clone()
    # Float32 in another order, at logits of magnitude 10.
    torch.testing.assert_close(runner.forward(replace(step, logit_rows=wanted)), every[wanted], rtol=0, atol=1e-4)
    assert replays.replayed[-2:] == [True, True]


def test_logits_that_are_wanted_in_another_order_than_that_of_rows_are_launched(
    tmp_path: Path, replays: Replays
) -> None:
    runner = make_runner(make_checkpoint(tmp_path))
    step = decode(drive(runner, 3))
    every = runner.forward(step).clone()
    torch.testing.assert_close(runner.forward(replace(step, logit_rows=[2, 0])), every[[2, 0]], rtol=0, atol=1e-4)
    assert not replays.replayed[-1]


@pytest.mark.parametrize("counts", [{0: 1, 1: 5}, {2: 20}, {0: 3, 1: 1, 3: 30}], ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("num_wanted", [0, 1, 2])
def test_chunks_of_which_the_last_logits_are_wanted_are_those_launched(
    tmp_path: Path, replays: Replays, counts: dict[int, int], window: int | None, num_wanted: int
) -> None:
    step, runner = chunks(tmp_path, counts, window)
    stops = list(accumulate(step.query_lens))
    wanted = [row for stop, count in zip(stops, step.query_lens, strict=True) for row in range(stop)[-num_wanted:]]
    wanted = wanted if num_wanted else []
    check_same(runner, replace(step, logit_rows=sorted(set(wanted))), replays)


@pytest.mark.parametrize("wanted", [list(range(15)), [1, 6, 14], [0, 1, 14]], ids=str)
def test_chunks_of_sequences_that_share_a_prefix_with_another_between_are_those_launched(
    tmp_path: Path, replays: Replays, wanted: list[int]
) -> None:
    prefix = [(7 * i) % 128 for i in range(MIN_SHARED_BLOCKS * BLOCK_SIZE)]
    runner = make_runner(make_checkpoint(tmp_path, head_dim=32), kv_memory=2**22)
    driver = Driver(runner, [[*prefix, *range(8)], list(range(40)), [*prefix, *range(9, 17)]])
    driver.block_tables[2][:MIN_SHARED_BLOCKS] = driver.block_tables[0][:MIN_SHARED_BLOCKS]
    driver.step({0: len(prefix), 1: 20})
    driver.num_computed[2] = len(prefix)
    check_same(runner, replace(driver.step_input({0: 2, 1: 5, 2: 8}), logit_rows=wanted), replays)


def test_steps_of_more_logits_than_recorded_are_launched(tmp_path: Path, replays: Replays) -> None:
    runner = make_runner(make_checkpoint(tmp_path), kv_memory=2**21)
    step = decode(drive(runner, MAX_RECORDED_ENDS + 1))
    last = runner.forward(step)[-1].clone()
    assert not replays.replayed[-1]
    columns = ("token_ids", "positions", "slot_mapping", "query_lens", "seq_lens", "block_tables")
    alone = replace(step, **{name: getattr(step, name)[-1:] for name in columns}, logit_rows=[0])
    torch.testing.assert_close(runner.forward(alone)[0], last, rtol=0, atol=1e-4)
    assert replays.replayed[-1]


@pytest.mark.parametrize("family", OTHERS)
def test_models_with_operations_of_torch_are_launched(tmp_path: Path, replays: Replays, family: str) -> None:
    folder = make_checkpoint(tmp_path, family)
    runner, plain = make_runner(folder), make_runner(folder, kernels="torch")
    found = runner.forward(decode(drive(runner, 5))).clone()
    assert not any(replays.replayed)
    # Float32 in another order, at logits of magnitude 10.
    torch.testing.assert_close(found, plain.forward(decode(drive(plain, 5))), rtol=0, atol=1e-4)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rows(token_ids: list[int]) -> StepInput:
    count = len(token_ids)
    tables = [[i] for i in range(count)]
    slots = [16 * i for i in range(count)]
    return StepInput(token_ids, [0] * count, slots, [1] * count, [1] * count, tables, list(range(count)))


def recorded(forward: Callable[[Batch], torch.Tensor]) -> RecordedSteps:
    """For up to 6 rows, 5 of them with logits."""
    return RecordedSteps(forward, {None}, 6, 5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("token_ids", [[3], [1, 4, 1, 0, 2]])
def test_two_threads_compute_the_rows_there_are(token_ids: list[int]) -> None:
    table, norm = torch.randn(5, 300), RmsNorm(torch.randn(300), 1e-6)
    steps = recorded(lambda batch: norm(take_rows(embed(batch.token_ids, table, 2.0), batch.ends.rows)))
    found = steps.replay(rows(token_ids), None)
    assert found is not None
    assert found.equal(norm(embed(torch.tensor(token_ids, dtype=torch.int64), table, 2.0)))
    assert steps.replay(rows([0] * 6), None) is None


@pytest.mark.parametrize("name", ["sum", "copy", "index"])
def test_pass_that_computes_anything_with_torch_is_not_recorded(name: str) -> None:
    table = torch.randn(5, 30)

    def forward(batch: Batch) -> torch.Tensor:
        x = embed(batch.token_ids, table, 2.0)
        return {"sum": lambda: x + x, "copy": lambda: x.clone(), "index": lambda: x[batch.token_ids]}[name]()

    assert recorded(forward).replay(rows([1, 2]), None) is None
