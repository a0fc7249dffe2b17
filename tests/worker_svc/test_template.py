"""What a template loads, and what becomes of it in a process that it forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import forked_engine
from tests.support.engine_requests import make_folder, make_settings
from weft.errors import SettingsError
from weft.exit_status import BAD_SETTINGS
from weft.template import ENVIRON, FLAG
from worker_svc.template import load_models_to_share


@pytest.mark.timeout(90)
def test_a_fork_computes_with_two_threads_what_a_plain_start_does() -> None:
    command = [sys.executable, str(Path(forked_engine.__file__))]
    environ = {**os.environ, **ENVIRON, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["forked"]) == 8 and found["forked"] == found["plain"]
    # The engine's own has ended; those of OpenMP stay.
    assert found["before"] == 1 and found["after"] > 1


@pytest.mark.parametrize("changes", [{"tensor_parallel": 2}, {"tensor_parallel": 2, "device": "cpu"}], ids=str)
def test_only_what_one_cpu_computes_is_shared(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="^fork: only workers on one CPU share their weights"):
        load_models_to_share(make_folder(), make_settings(**changes))


def test_an_engine_without_a_model_shares_none() -> None:
    assert load_models_to_share(make_folder(), make_settings(engine="null")) is None


def test_bad_settings_end_a_template_with_one_sentence() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WEFT_MODEL": "./nowhere"}
    command = [sys.executable, "-m", "worker_svc", FLAG]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == BAD_SETTINGS and not done.stdout
    assert done.stderr.startswith("worker_svc: no model './nowhere'")
