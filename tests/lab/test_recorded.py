"""lab.recorded: a run that was made by a known cost is read back, and the cost is found from half of its requests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from lab.recorded import fit_recording, measured, read_recordings, simulated
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Arrival, Trace
from scheduler_svc.cost_model import CostModel
from scheduler_svc.policies import PolicyNames
from weft.errors import SettingsError
from worker_svc.batch import Limits

COST = CostModel(0.03, 1e-4, 2e-9, 1e-7, 3e-4)
ENGINE = {"data_parallel_size": 1, "max_num_seqs": 16, "max_num_batched_tokens": 512}


def record(folder: Path) -> None:
    """Write a run of the simulator as a recording."""
    chance = random.Random(1)
    arrivals = [Arrival(0.2 * i, chance.randrange(50, 1500), chance.randrange(2, 150)) for i in range(60)]
    fleet = Fleet(1, COST, Limits(16, 512), 1_000_000)
    setup = Setup(fleet, PolicyNames(admit="open", route="least_loaded"), hop_s=0.0)
    rows = [
        {
            "input_toks": one.num_prompt_tokens,
            "output_toks": one.num_output_tokens,
            "queued_ts": 100 + one.arrived_at,
            "first_token_ts": 100 + (one.first_token_at or 0),
            "last_token_ts": 100 + (one.ended_at or 0),
        }
        for one in simulate(Trace("x", tuple(arrivals), 16), setup).records
    ]
    stem = folder / "llmservingsim_vllm_bench_X"
    stem.with_suffix(".requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stem.with_suffix(".meta.json").write_text(json.dumps({"engine_kwargs": ENGINE}))


def test_the_cost_that_made_a_run_is_found_from_half_of_it(tmp_path: Path) -> None:
    record(tmp_path)
    [recording] = read_recordings(tmp_path)
    odd = np.arange(60) % 2 == 1

    truth, found = measured(recording), simulated(recording, fit_recording(recording, ~odd))

    # 30 requests do not tell the constants apart, so as far as `lab.validate` lets real runs be off.
    for share in (0.5, 0.9):
        assert np.quantile(found.gaps_s[odd], share) == pytest.approx(np.quantile(truth.gaps_s[odd], share), rel=0.1)
        assert np.quantile(found.ttfts_s[odd], share) == pytest.approx(np.quantile(truth.ttfts_s[odd], share), rel=0.1)


def test_a_folder_without_recordings_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no recorded runs"):
        read_recordings(tmp_path)
