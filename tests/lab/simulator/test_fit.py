from __future__ import annotations

import json
import random
from dataclasses import astuple
from pathlib import Path

import pytest

from lab.simulator.fit import Step, distserve_cost, fit, splitwise_steps, step_s
from scheduler_svc.cost_model import CostModel
from weft.errors import SettingsError
from worker_svc.batch import Work

COST = CostModel(0.03, 6e-5, 7e-9, 2e-7, 2e-4, 5e-3)
HEAD = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"


def measure(cost: CostModel, noise: float = 0.0) -> list[Step]:
    chance, steps = random.Random(0), []
    for _ in range(200):
        new, sequences = chance.randrange(4000), chance.randrange(60)
        seen, context = new * chance.uniform(1, 9000), sequences * chance.randrange(1, 9000)
        work = Work(new, seen, sequences, context, num_chunks=chance.randrange(1, 5) if new else 0)
        steps.append(Step(work, step_s(cost, work) * chance.uniform(1 - noise, 1 + noise)))
    return steps


def test_exact_times_give_the_constants_back() -> None:
    found = fit(measure(COST))
    assert astuple(found.cost) == pytest.approx(astuple(COST), rel=1e-6)
    assert found.worst_error < 1e-9


def test_noise_of_a_tenth_leaves_the_error_of_noise() -> None:
    found = fit(measure(COST, noise=0.1))
    assert 0.02 < found.median_error < 0.08 and found.worst_error < 0.15


def test_no_constant_is_below_zero() -> None:
    # Longer contexts are faster here, which no non-negative constant says.
    steps = [Step(Work(0, 0, 1, context), 0.05 - 1e-6 * context) for context in range(0, 10_000, 500)]
    cost = fit(steps).cost
    assert min(astuple(cost)) >= 0 and cost.context_s == 0
    assert 0.04 < step_s(cost, Work(num_sequences=1)) < 0.05


def test_no_steps_are_refused() -> None:
    for steps in ([], [Step(Work(1, 1), 0.0)]):
        with pytest.raises(SettingsError, match="steps that took time"):
            fit(steps)


def test_splitwise_rows_are_a_prefill_and_a_mean_decode(tmp_path: Path) -> None:
    path = tmp_path / "perf.csv"
    path.write_text(HEAD + "m,h,512,2,128,80,30,8\nm,h,512,2,128,100,34,8\nm,h,512,2,128,1,1,4\n")
    found = splitwise_steps(path)
    assert set(found) == {"m h tp8", "m h tp4"}
    assert found["m h tp8"] == [
        Step(Work(1024, 512**2, num_chunks=2), 0.09),
        Step(Work(num_sequences=2, num_context_tokens=2 * 576), 0.032),
    ]


def test_bad_measurement_is_named(tmp_path: Path) -> None:
    path = tmp_path / "perf.csv"
    path.write_text(HEAD + "m,h,512,2,128,80,30,8\nm,h,512,two,128,80,30,8\n")
    with pytest.raises(SettingsError, match=r"perf\.csv, line 3 is not a measurement"):
        splitwise_steps(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        splitwise_steps(tmp_path / "none.csv")


def test_distserves_squares_are_twice_our_halves(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    fitted = {"prefill": [20, 0.1, 8e-6], "decoding_smallbs": [24, 5e-4, 0.06]}
    path.write_text(json.dumps({"opt": {"1": fitted}}))
    cost = distserve_cost(path, "opt", 1)
    assert astuple(cost) == pytest.approx((0.022, 1e-4, 16e-9, 5e-7, 6e-5, 0))
    assert cost.prefill_s(100) == pytest.approx((0.1 * 100 + 8e-6 * 100**2) / 1e3)
    with pytest.raises(SettingsError, match="no fit for opt on 2 cards"):
        distserve_cost(path, "opt", 2)
