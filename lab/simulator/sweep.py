"""Runs of the simulator over traces, presets and loads: what is played, by how many processes, and what came out."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from random import Random

from lab.simulator.kv_pool import KvSharing
from lab.simulator.record import Slo, Summary
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Trace
from scheduler_svc.hardware import Hardware
from scheduler_svc.policies import PolicyMaker, PolicyNames
from scheduler_svc.policy.admit import Objectives
from weft.errors import SettingsError
from weft.messages import WorkerRole
from weft.presets import Preset
from worker_svc.batch import Limits

# Predictions that are the truth; a name for simulations alone.
ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Knobs:
    """What is the same in all runs. None leaves it to the preset or the hardware."""

    hardware: Hardware
    slo: Slo
    policies: Mapping[str, str] = field(default_factory=dict)  # instead of the preset's
    roles: Mapping[WorkerRole, int] = field(default_factory=dict)  # instead of the preset's
    batching: str | None = None
    reserve: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None
    pool_tokens: int | None = None  # of memory that all workers share; 0 = none
    link_bytes_per_s: float = 12.5e9
    says_max_tokens: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    trace: Trace  # in its own time
    preset: str
    load: float
    setup: Setup


@dataclass(frozen=True, slots=True)
class Row:
    """What a run gave."""

    trace: str
    preset: str
    load: float
    num_workers: int
    offered_rps: float
    summary: Summary


def make_setup(trace: Trace, preset: Preset, num_workers: int, knobs: Knobs) -> Setup:
    """A preset's setup for a trace.

    Raises:
        InvalidRequest: a policy has no such name.
    """
    knows_lengths = knobs.policies.get("predict") == ORACLE
    changes = {family: name for family, name in knobs.policies.items() if not (knows_lengths and family == "predict")}
    block_s = None
    sharing = _sharing(preset, num_workers, knobs)
    if sharing is not None:
        block_s = sharing.block_s(trace.block_size)
    return Setup(
        fleet=Fleet(
            num_workers=num_workers,
            cost=knobs.hardware.cost,
            limits=_limits(trace, preset, knobs),
            kv_tokens=knobs.kv_tokens or knobs.hardware.kv_tokens,
            roles=knobs.roles or Counter(preset.roles_of(num_workers)),
            sharing=sharing,
            spread=knobs.hardware.spread,
        ),
        names=PolicyNames(**preset.policies).with_changes(changes),
        maker=PolicyMaker(
            Random(knobs.seed),
            cost=knobs.hardware.cost,
            objectives={"": Objectives(knobs.slo.ttft_s, knobs.slo.tbt_s)},
            block_transfer_s=block_s,
            block_size=trace.block_size,
        ),
        knows_lengths=knows_lengths,
        says_max_tokens=knobs.says_max_tokens,
        slo=knobs.slo,
    )


def _limits(trace: Trace, preset: Preset, knobs: Knobs) -> Limits:
    num_blocks = (knobs.kv_tokens or knobs.hardware.kv_tokens) // trace.block_size
    longest = max(arrival.num_prompt_tokens + arrival.num_output_tokens for arrival in trace.arrivals)
    return Limits(
        max_num_seqs=knobs.max_num_seqs or preset.max_num_seqs,
        max_num_batched_tokens=knobs.max_num_batched_tokens or preset.max_num_batched_tokens,
        policy=knobs.batching or preset.batching,
        reserve=knobs.reserve or preset.reserve,
        # As a worker's context, which is no longer than its memory.
        max_model_len=min(longest, num_blocks * trace.block_size),
    )


def _sharing(preset: Preset, num_workers: int, knobs: Knobs) -> KvSharing | None:
    """A preset with a pool has as much of it as all workers have of their own, unless it is said how much."""
    tokens = knobs.pool_tokens
    if tokens is None:
        tokens = num_workers * knobs.hardware.kv_tokens if preset.uses_pool else 0
    if not tokens and set(knobs.roles or preset.roles_of(num_workers)) == {"both"}:
        return None
    return KvSharing(knobs.hardware.kv_bytes_per_token, tokens, knobs.link_bytes_per_s)


def play(case: Case) -> Row:
    """Run one case."""
    trace = case.trace.faster(case.load)
    result = simulate(trace, case.setup)
    return Row(
        trace=trace.name,
        preset=case.preset,
        load=case.load,
        num_workers=len(result.workers),
        offered_rps=trace.rate_rps,
        summary=result.summary(),
    )


def play_all(cases: Sequence[Case], num_processes: int, tell: Callable[[int, Row | None], None]) -> list[Row]:
    """Run all cases; rows are in the order of the cases. `tell` hears how many have ended, and of each as it ends."""
    tell(0, None)
    rows: dict[int, Row] = {}
    for number, row in _play_any(cases, min(num_processes, len(cases))):
        rows[number] = row
        tell(len(rows), row)
    return [rows[number] for number in range(len(cases))]


def _play_any(cases: Sequence[Case], num_processes: int) -> Iterator[tuple[int, Row]]:
    if num_processes <= 1:
        yield from enumerate(map(play, cases))
        return
    # A fork would have this process's locks as they are at that moment.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_ignore_interrupts) as executor:
        futures = {executor.submit(play, case): number for number, case in enumerate(cases)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise SettingsError("a run's process was killed, maybe for want of memory: try fewer --jobs") from error
        except BaseException:
            # Whatever ends this early, Ctrl-C too, ends the runs; else the pool would wait for them.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _ignore_interrupts() -> None:
    """Every process of a terminal gets a Ctrl-C; the first one takes care of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def find_size(share_with: Callable[[int], float], share: float, most: int) -> int | None:
    """The fewest workers with which `share_with` is at least `share`, None if even `most` are too few.

    Doubling, then bisection: more workers are taken to be never worse, which chance may contradict by a worker. None
    too where doubling twice made no request good: what is late on a worker of its own is late on any number.
    """
    low, high, found = 0, 1, [share_with(1)]
    while found[-1] < share:
        if high == most or (len(found) > 2 and 0 < found[-3] == found[-2] == found[-1]):
            return None
        low, high = high, min(2 * high, most)
        found.append(share_with(high))
    while high - low > 1:
        middle = (low + high) // 2
        if share_with(middle) >= share:
            high = middle
        else:
            low = middle
    return high
