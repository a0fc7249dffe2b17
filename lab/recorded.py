"""Recorded runs of an engine that is not ours, played by the simulator: vLLM 0.19 on four machines.

Source: LLMServingSim's bench examples (casys-kaist), 300 requests each with ShareGPT's lengths, 10 new ones a second.
Only when requests came, started and ended is known, not what steps took. So the constants of the cost formula are
those with which the simulator's times for one half of the requests come closest to the recorded ones; the other half
says how good they are.
"""

from __future__ import annotations

import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lab.simulator.record import Record
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Arrival, Trace
from lab.times import Array, Times
from scheduler_svc.cost_model import CostModel
from scheduler_svc.policies import PolicyNames
from weft.errors import SettingsError
from worker_svc.batch import Limits

# Where no recording says how much KV memory there was, there was more than could be used.
AMPLE_TOKENS: Final = 1_000_000
BLOCK_SIZE: Final = 16
# Seconds below which a difference in the time to the first token is noise: a step or two.
FLOOR_S: Final = 0.1
START: Final = CostModel(0.02, 5e-5, 1e-9, 5e-8, 1e-4, 1e-3)
NUM_ROUNDS: Final = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """One run: what was asked, and what happened to it; times are seconds since the first request was queued."""

    name: str
    trace: Trace
    ttfts_s: tuple[float, ...]
    decodes_s: tuple[float, ...]  # from the first token to the last
    fleet: Fleet

    def with_cost(self, cost: CostModel) -> Setup:
        fleet = Fleet(self.fleet.num_workers, cost, self.fleet.limits, self.fleet.kv_tokens)
        return Setup(fleet, PolicyNames(admit="open", route="least_loaded"), hop_s=0.0)


def read_recordings(folder: Path) -> list[Recording]:
    """All runs in a folder.

    Raises:
        SettingsError: there is none.
    """
    paths = sorted(folder.glob("llmservingsim_*.requests.jsonl"))
    if not paths:
        raise SettingsError(f"there are no recorded runs (llmservingsim_*.requests.jsonl) in {folder}")
    return [_read(path) for path in paths]


def _read(path: Path) -> Recording:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: row["queued_ts"])
    meta: dict[str, Any] = json.loads(path.with_name(path.name.replace(".requests.jsonl", ".meta.json")).read_text())
    engine, began = meta["engine_kwargs"], rows[0]["queued_ts"]
    arrivals = tuple(Arrival(row["queued_ts"] - began, row["input_toks"], row["output_toks"]) for row in rows)
    fleet = Fleet(
        num_workers=engine["data_parallel_size"],
        cost=START,
        limits=Limits(engine["max_num_seqs"], engine["max_num_batched_tokens"]),
        kv_tokens=meta.get("kv_cache", {}).get("num_kv_tokens", AMPLE_TOKENS),
    )
    return Recording(
        name=path.name.removeprefix("llmservingsim_vllm_bench_").removesuffix(".requests.jsonl"),
        trace=Trace(path.stem, arrivals, BLOCK_SIZE),
        ttfts_s=tuple(row["first_token_ts"] - row["queued_ts"] for row in rows),
        decodes_s=tuple(row["last_token_ts"] - row["first_token_ts"] for row in rows),
        fleet=fleet,
    )


def measured(recording: Recording) -> Times:
    """What the recording says; a request's gap is the mean of all."""
    decodes = np.array(recording.decodes_s)
    num_gaps = np.array([max(1, arrival.num_output_tokens - 1) for arrival in recording.trace.arrivals])
    return Times(np.array(recording.ttfts_s), decodes, decodes / num_gaps)


def simulated(recording: Recording, cost: CostModel) -> Times:
    """What the simulator says."""
    records = simulate(recording.trace, recording.with_cost(cost)).records
    by_number: dict[int, Record] = {int(record.request_id[1:]): record for record in records}
    ordered = [by_number[number] for number in range(len(records))]
    return Times.of(ordered, lambda record: (record.e2e_s - record.ttft_s) / max(1, record.num_output_tokens - 1))


def fit_recording(recording: Recording, chosen: npt.NDArray[np.bool_]) -> CostModel:
    """The constants for the times of the chosen requests, by Levenberg's and Marquardt's method on their logarithms."""
    truth = measured(recording)

    def residuals(logs: Array) -> Array:
        found = simulated(recording, CostModel(*np.exp(logs)))
        ttfts = np.log((found.ttfts_s + FLOOR_S) / (truth.ttfts_s + FLOOR_S))
        decodes = np.log((found.decodes_s + FLOOR_S) / (truth.decodes_s + FLOOR_S))
        return np.concatenate([ttfts[chosen], decodes[chosen]])

    logs = np.log(np.array(astuple(recording.fleet.cost)))
    best, damping = residuals(logs), 0.1
    for _ in range(NUM_ROUNDS):
        slopes = np.stack([(residuals(logs + step) - best) / 0.1 for step in 0.1 * np.eye(len(logs))], axis=1)
        normal, gradient = slopes.T @ slopes, slopes.T @ best
        for _ in range(4):
            change = -np.linalg.solve(normal + damping * (np.diag(np.diag(normal)) + np.eye(len(logs))), gradient)
            tried = logs + np.clip(change, -1.5, 1.5)
            errors = residuals(tried)
            if errors @ errors < best @ best:
                logs, best, damping = tried, errors, damping / 4
                break
            damping *= 4
    return CostModel(*(math.exp(log) for log in logs))
