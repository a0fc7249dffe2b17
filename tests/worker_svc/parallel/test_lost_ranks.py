"""How ranks end: by a signal, with rank 0, or because they refuse what they are told.

A file of its own: a process is in one group at a time, and that of `test_leader.py` lasts as long as its module.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.engine_requests import make_settings
from tests.support.steps import Driver, make_runner, mixed
from weft import model_folder
from weft.errors import SettingsError, Unavailable
from weft.model_folder import ModelFolder
from weft.settings import ModelSettings
from worker_svc.parallel.leader import Follower, ParallelRunner, first_command
from worker_svc.parallel.pipe import Loaded

# Each process imports torch, on a machine that may be busy.
pytestmark = pytest.mark.timeout(120)
SEQUENCES = [[(7 * i + 3 * j) % 128 for j in range(length)] for i, length in enumerate((1, 17, 40))]
SCHEDULE = list(mixed([len(sequence) for sequence in SEQUENCES]))
ARGUMENTS = {"device": "cpu", "dtype": "float32", "kv_memory": 2**20, "threads": 1}
END_S = 60.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), num_key_value_heads=4)


@pytest.fixture(scope="module")
def folder(path: Path) -> ModelFolder:
    return model_folder.read(ModelSettings(model=str(path)))


def test_lost_rank_of_four_is_told_of_at_once(path: Path, folder: ModelFolder) -> None:
    lost: list[Exception] = []
    told = threading.Event()
    settings = make_settings(tensor_parallel=4, **ARGUMENTS)
    runner = ParallelRunner(folder, settings, on_lost=lambda error: (lost.append(error), told.set()))
    try:
        driver = Driver(runner, SEQUENCES)
        expected = Driver(make_runner(path), SEQUENCES).play(SCHEDULE)
        # Sums of other parts of the same products, in float32 and at logits of magnitude 10.
        torch.testing.assert_close(driver.play(SCHEDULE), expected, rtol=0, atol=1e-4)
        processes = [follower.process for follower in runner.followers]
        processes[1].kill()
        assert told.wait(END_S)
        assert "rank 2 of the worker ended: signal 9" in str(lost[0])
        with pytest.raises((Unavailable, RuntimeError)):
            runner.forward(driver.step_input({}))
    finally:
        runner.close()
    assert all(process.poll() is not None for process in processes)


def test_rank_ends_with_its_pipe(folder: ModelFolder) -> None:
    command = first_command(folder, make_settings(tensor_parallel=2, **ARGUMENTS), "/nowhere")
    follower = Follower(command, 1, lambda error: None)
    follower.expect(Loaded)
    # As the system does when rank 0 dies.
    follower.hang_up()
    assert follower.process.wait(END_S) == 1
    follower.close()


def test_what_a_rank_refuses_is_said(folder: ModelFolder) -> None:
    wrong = dataclasses.replace(folder, path=folder.path / "nothing here")
    follower = Follower(first_command(wrong, make_settings(tensor_parallel=2), "/nowhere"), 1, lambda error: None)
    with pytest.raises(SettingsError, match="nothing here"):
        follower.expect(Loaded)
    assert follower.process.wait(END_S) == 2
    follower.close()
