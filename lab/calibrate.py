"""`weft calibrate`: how long steps of a real engine take, and the constants of the cost formula that say so.

It runs the engine alone, with a worker's flags, over a grid of prefills and decodes; every other cell is fitted, and
the error over the others is printed. The file that `--out` names is what `weft sim --hardware FILE` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lab.simulator.fit import Step, fit
from lab.simulator.hardware import Hardware
from scheduler_svc.cost_model import CostModel
from weft.columns import pack_u32
from weft.errors import SettingsError, WeftError
from weft.exit_status import BAD_SETTINGS
from weft.hashing import BLOCK_SIZE, block_hashes, chain_root
from weft.messages import Choice, SamplingParams, TokenizedRequest
from weft.model_folder import ModelFolder, digest, read
from weft.settings import WorkerSettings, load

if TYPE_CHECKING:
    from worker_svc.engine import Engine

PREFILLS: Final = (16, 64, 128, 256, 512)
CONTEXTS: Final = (0, 64, 256, 512)
BATCHES: Final = (1, 2, 4, 8, 16)
# Each cell is the least of so many: whatever else the machine does only adds.
NUM_REPEATS: Final = 3
NUM_DECODES: Final = 10
BAR: Final = 0.10


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """The constants, and how far they are off where they were not fitted, as shares of the measured times."""

    hardware: Hardware
    num_fitted: int
    errors: tuple[float, ...]  # of the held-out steps

    @property
    def mean_error(self) -> float:
        return statistics.fmean(self.errors)


def main(argv: Sequence[str]) -> int:
    """Calibrate, print the constants and their error, and write the file; 0 whatever the error is."""
    parser = argparse.ArgumentParser(prog="weft calibrate", description=__doc__, add_help=False)
    parser.add_argument("--out", type=Path)
    try:
        options, flags = parser.parse_known_args(list(argv))
        found = calibrate(load(WorkerSettings, flags, os.environ, prog="weft calibrate [--out FILE]"))
        if options.out is not None:
            _write(options.out, found.hardware)
    except WeftError as error:
        sys.stderr.write(f"weft calibrate: {error.message}\n")
        return BAD_SETTINGS
    for name, value in dataclasses.asdict(found.hardware.cost).items():
        sys.stdout.write(f"{name} {value:.4g}\n")
    held, verdict = len(found.errors), "ok" if found.mean_error <= BAR else "short"
    sys.stdout.write(f"held-out error, mean of {held} steps | {found.mean_error:.1%} | at most {BAR:.0%} | {verdict}\n")
    return 0


def calibrate(settings: WorkerSettings) -> Calibration:
    """Measure an engine with these settings, fit one half of the steps, and judge by the other."""
    # Only this needs torch.
    from worker_svc.torch_engine import load_engine

    folder = read(settings.model)
    bench = Bench(load_engine(folder, settings), folder)
    steps = list(bench.steps(settings))
    fitted, held_out = steps[::2], steps[1::2]
    cost = fit(fitted).cost
    pool = bench.engine.pool
    hardware = Hardware(
        what=f"{folder.name} on {platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        cost=cost,
        kv_tokens=pool.num_blocks * pool.block_size,
        kv_bytes_per_token=max(1, bench.engine.block_bytes // pool.block_size),
    )
    return Calibration(hardware, len(fitted), tuple(error_of(cost, step) for step in held_out))


def error_of(cost: CostModel, step: Step) -> float:
    """How far the formula is off for a step, as a share of what it took."""
    terms = zip(dataclasses.astuple(cost), step.terms, strict=True)
    return abs(sum(float(constant) * term for constant, term in terms) / step.seconds - 1)


class Bench:
    """An engine, and steps of it that are timed."""

    def __init__(self, engine: Engine, folder: ModelFolder) -> None:
        self.engine = engine
        self._folder = folder
        self._root = chain_root(digest(folder))
        self._chance = random.Random(1)
        self._num_asked = 0

    def steps(self, settings: WorkerSettings) -> Iterator[Step]:
        """The cells of the grid that fit the settings, in an order by chance so that drifts of the machine spread."""
        capacity = self.engine.pool.num_blocks * BLOCK_SIZE
        longest = min(self._folder.max_model_len, capacity) - NUM_DECODES - 2
        budget = settings.max_num_batched_tokens
        cells = [("prefill", n, c) for n in PREFILLS for c in CONTEXTS if n <= budget and n + c <= longest]
        most = min(settings.max_num_seqs, max(BATCHES))
        cells += [
            ("decode", b, max(c, BLOCK_SIZE))
            for b in BATCHES
            for c in CONTEXTS
            if b <= most and c + 2 * NUM_DECODES + b * c // budget <= longest and b * (c + 128) < capacity
        ]
        if not cells:
            raise SettingsError("no step fits this engine: its memory or its budget is too small")
        self._prefill_s(BLOCK_SIZE, 0)
        self._chance.shuffle(cells)
        for kind, count, context in cells:
            if kind == "prefill":
                seconds = min(self._prefill_s(count, context) for _ in range(NUM_REPEATS))
                yield Step(count, count * (context + 0.5 * count), 0, 0, seconds)
            else:
                yield self._decode(count, context, budget)

    def _prefill_s(self, num_new: int, num_cached: int) -> float:
        """A prompt of which the first tokens are cached."""
        start = self._tokens(num_cached)
        if start:
            self._ask(start, 1)
            self._finish()
        self._ask(start + self._tokens(num_new), 1)
        return sum(self._finish())

    def _decode(self, num_sequences: int, context: int, budget: int) -> Step:
        """Sequences that all decode, from prompts of so many tokens on."""
        # The first ones go on while the prompts of the others are computed.
        num_before = 2 + num_sequences * context // budget
        for _ in range(num_sequences):
            self._ask(self._tokens(context), NUM_DECODES + num_before)
        times, contexts = [], []
        while self.engine.has_work:
            running = self.engine.running
            is_decode = len(running) == num_sequences and all(s.num_uncomputed_tokens == 1 for s in running)
            num_seen = sum(len(sequence.token_ids) for sequence in running)
            began = time.perf_counter()
            self.engine.step()
            if is_decode:
                times.append(time.perf_counter() - began)
                contexts.append(num_seen)
        return Step(0, 0, num_sequences, statistics.fmean(contexts), min(times))

    def _finish(self) -> list[float]:
        """Step until all has ended; how long each step took."""
        times = []
        while self.engine.has_work:
            began = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - began)
        return times

    def _ask(self, prompt: list[int], num_tokens: int) -> None:
        from worker_svc.engine_io import Add

        self._num_asked += 1
        column = pack_u32(prompt)
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        hashes = b"".join(block_hashes(self._root, column))
        name = f"r{self._num_asked}"
        choices = [Choice(slot=self._num_asked, seed=0)]
        request = TokenizedRequest(name, 0, "lab", self._folder.name, column, hashes, sampling, choices)
        self.engine.apply(Add(request))

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(10, 1000) for _ in range(count)]


def _write(path: Path, hardware: Hardware) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(hardware)) + b"\n")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error}") from error
