"""A live mesh beside its simulation: the same requests at the same moments, to `weft up` and to the simulator.

What a forward pass takes is fitted to every other step that the worker wrote down during the run itself, since a shared
machine is another one a minute later, and a hop of the bus to requests that came one at a time before.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import uvloop

from lab import ring
from lab.calibrate import judge
from lab.client import Stream, complete
from lab.simulator.fit import Step
from lab.simulator.record import Record
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Arrival, Trace
from lab.times import Times
from scheduler_svc.cost_model import CostModel
from weft.hashing import BLOCK_SIZE
from weft.presets import WEFT
from worker_svc.batch import Limits
from worker_svc.step_log import read_steps

HOST: Final = "127.0.0.1"
# Blocks go nowhere, so that sending them does not take the cores from what is measured.
FLAGS: Final = ("--kv-offload", "never", "--kv-load", "never")
# Of a client's way to its first token, as `Setup.hop_s` counts them.
NUM_HOPS: Final = 5
NUM_PROBES: Final = 12
PROBE_TOKENS: Final = 64
# Tokens of prompts and answers, log-normal: median, sigma, least, most.
PROMPT: Final = (120, 0.8, 16, 900)
ANSWER: Final = (32, 0.6, 4, 128)
# More than any run here needs.
KV_TOKENS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Measured:
    """What a machine takes: constants of the formula, how times spread around it, and seconds of a hop."""

    cost: CostModel
    spread: tuple[float, ...]
    hop_s: float
    errors: tuple[float, ...]  # of the steps that were held out


@dataclass(frozen=True, slots=True)
class Run:
    """A live run: what its clients saw, and what its worker wrote down."""

    probes_s: tuple[float, ...]  # to the first token of requests that came one at a time
    times: Times  # as `simulated` has them
    steps: tuple[Step, ...]

    def measured(self) -> Measured:
        """What the run says of the machine."""
        # The worker's first prompts were those of the probes.
        prefills = [step.seconds for step in self.steps if step.work.num_chunks]
        beside = [probe_s - step_s for probe_s, step_s in zip(self.probes_s, prefills, strict=False)]
        cost, spread, errors = judge(self.steps)
        return Measured(cost, spread, max(0.0, statistics.median(beside)) / NUM_HOPS, tuple(errors))


def make_trace(seed: int, rate_rps: float, seconds: float) -> Trace:
    """Requests at random moments that share nothing."""
    chance, now, arrivals = random.Random(seed), 0.0, []
    while (now := now + chance.expovariate(rate_rps)) < seconds:
        arrivals.append(Arrival(now, _length(chance, *PROMPT), _length(chance, *ANSWER)))
    return Trace("live", tuple(arrivals), BLOCK_SIZE)


def _length(chance: random.Random, median: int, sigma: float, least: int, most: int) -> int:
    return max(least, min(most, round(median * chance.lognormvariate(0.0, sigma))))


def live(model: str, trace: Trace) -> Run:
    """Play a trace to a mesh of one worker.

    Raises:
        RuntimeError: a request did not get all its tokens.
    """
    with tempfile.TemporaryDirectory(prefix="weft-steps-") as folder:
        with ring.running("--model", model, "--step-log", folder, *FLAGS) as mesh:
            ring.wait_until_idle()
            probes, streams = uvloop.run(_ask_all(mesh.port, Path(model).name, trace))
        (path,) = Path(folder).iterdir()
        steps = tuple(Step(work, seconds) for work, seconds in read_steps(path))
    for arrival, stream in zip(trace.arrivals, streams, strict=True):
        if stream.completion_tokens != arrival.num_output_tokens or not stream.is_done:
            raise RuntimeError(f"a stream of {arrival.num_output_tokens} tokens got {stream.completion_tokens}")
    times = Times.of(map(_record, trace.arrivals, streams), Record.worst_gap_s)
    return Run(tuple(probe.ttft_s for probe in probes), times, steps)


def _record(arrival: Arrival, stream: Stream) -> Record:
    """What a client saw, as the simulator would have it."""
    gaps = [(after - before, 1) for before, after in pairwise(stream.chunk_times)]
    return Record(
        "",
        0.0,
        arrival.num_prompt_tokens,
        arrival.num_output_tokens,
        first_token_at=stream.ttft_s,
        ended_at=stream.ttft_s + sum(gap for gap, _ in gaps),
        gaps=gaps,
    )


async def _ask_all(port: int, model: str, trace: Trace) -> tuple[list[Stream], list[Stream]]:
    """One at a time, then the trace."""
    chance = random.Random(len(trace.arrivals))
    probes = [await _ask(port, model, chance, PROBE_TOKENS, 2, 0.0) for _ in range(NUM_PROBES)]
    tasks = [
        asyncio.create_task(_ask(port, model, chance, one.num_prompt_tokens, one.num_output_tokens, one.at_s))
        for one in trace.arrivals
    ]
    return probes, list(await asyncio.gather(*tasks))


async def _ask(port: int, model: str, chance: random.Random, num_prompt: int, num_output: int, wait_s: float) -> Stream:
    prompt = [chance.randrange(10, 1000) for _ in range(num_prompt)]
    await asyncio.sleep(wait_s)
    body = {"model": model, "prompt": prompt, "max_tokens": num_output, "temperature": 0, "ignore_eos": True}
    return await complete(HOST, port, body)


def simulated(trace: Trace, machine: Measured) -> Times:
    """Play the trace to one simulated worker with a worker's default settings.

    Returns: the times, whose gaps are the mean of a request's longest tenth, as `weft sim` has it.
    """
    limits = Limits(WEFT.max_num_seqs, WEFT.max_num_batched_tokens)
    fleet = Fleet(1, machine.cost, limits, KV_TOKENS, spread=machine.spread)
    records = simulate(trace, Setup(fleet, says_max_tokens=True, hop_s=machine.hop_s)).records
    return Times.of(sorted(records, key=lambda record: record.arrived_at), Record.worst_gap_s)
