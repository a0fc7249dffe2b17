"""`weft calibrate`: how long steps of a real engine take, and the constants of the cost formula that say so.

It runs the engine alone, with a worker's flags, over a grid of prompts and decodes, or reads what a live worker wrote
down (`--step-log FOLDER` of a worker, `--steps FILE` here). Every other step is fitted, and the error over the others
is printed. The file that `--out` names is for `weft sim --hardware FILE` and for a scheduler's `--cost-file FILE`.
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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lab.simulator.fit import Step, fit
from scheduler_svc.cost_model import CostModel
from scheduler_svc.hardware import Hardware
from weft.columns import pack_u32
from weft.errors import SettingsError, WeftError
from weft.exit_status import BAD_SETTINGS
from weft.hashing import BLOCK_SIZE, block_hashes, chain_root
from weft.messages import Choice, SamplingParams, TokenizedRequest
from weft.model_folder import ModelFolder, digest, read
from weft.settings import WorkerSettings, load
from worker_svc.step_log import read_steps

if TYPE_CHECKING:
    from worker_svc.engine import Engine

PROMPTS: Final = (16, 64, 128, 256)
CONTEXTS: Final = (0, 64, 256, 512)
BATCHES: Final = (1, 2, 4, 8, 16)
# Sequences that decode while a prompt is computed, the tokens that each sees, and the prompt's.
BESIDE: Final = tuple((count, context, new) for count in (1, 4, 12) for context in (64, 400) for new in (32, 128))
# Prompts of one step, and the tokens of each.
TOGETHER: Final = ((2, 32), (2, 96), (4, 16), (4, 48))
# The grid is gone through so many times, and each cell is the least of its times: whatever else the machine does only
# adds, and lasts for seconds.
NUM_PASSES: Final = 5
NUM_DECODES: Final = 10
BAR: Final = 0.10
ABOUT: Final = """\
Time the steps of an engine on this machine, and fit the cost formula to them.

A model is loaded as a worker with the same flags would load it, alone and
without a mesh, and steps of some fifty kinds are timed five times each: prompts
of several lengths, with and without a cached part, batches that decode, and
both together. It takes some 20 s for the bundled model on two CPU cores, longer
where steps are longer; let nothing else compute meanwhile. With --steps it reads
instead what live workers wrote down while they served.

The formula's constants are printed, in seconds: of a step (overhead_s), of each
token of a prompt (token_s) and each earlier one that it sees (attention_s), of
each prompt or piece of one (chunk_s), of each sequence that decodes (sequence_s)
and each token that it sees (context_s). They are fitted to every other step; the
mean error over the rest is printed with them, and up to 10% is ok.

  weft calibrate --model MODEL --out mine.json
  weft sim --trace FILE --hardware mine.json     plays such workers
  weft up --model MODEL --cost-file mine.json    schedules by these constants

Of a live mesh, whose file has the spread of the times, too:

  weft up --model MODEL --step-log FOLDER
  weft calibrate --model MODEL --steps FOLDER/*.csv --out mine.json
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """A step to be measured: prompts beside sequences that decode."""

    num_prompts: int = 0
    num_new: int = 0  # tokens of each prompt
    num_cached: int = 0  # of each prompt, before these
    num_sequences: int = 0
    context: int = 0  # tokens of each sequence when it begins to decode


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """The constants, and how far they are off where they were not fitted, as shares of the measured times."""

    hardware: Hardware
    errors: tuple[float, ...]  # of the held-out steps

    @property
    def mean_error(self) -> float:
        return statistics.fmean(self.errors)


def main(argv: Sequence[str]) -> int:
    """Calibrate, print the constants and their error, and write the file; 0 whatever the error is."""
    parser = argparse.ArgumentParser(
        prog="weft calibrate",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    own = parser.add_argument_group("calibration")
    own.add_argument(
        "--out", type=Path, metavar="FILE", help="write the constants there, and how many tokens of KV a worker holds"
    )
    own.add_argument(
        "--steps", type=Path, nargs="+", default=[], metavar="FILE", help="files of a worker's --step-log to fit"
    )
    try:
        options, flags = parser.parse_known_args(list(argv))
        settings = load(WorkerSettings, flags, os.environ, prog="weft calibrate", command=parser)
        found = calibrate(settings, options.steps)
        if options.out is not None:
            _write(options.out, found.hardware)
    except WeftError as error:
        sys.stderr.write(f"weft calibrate: {error.message}\n")
        return BAD_SETTINGS
    for name, value in dataclasses.asdict(found.hardware.cost).items():
        sys.stdout.write(f"{name} {value:.4g}\n")
    held, verdict = len(found.errors), "ok" if found.mean_error <= BAR else "short"
    sys.stdout.write(f"held-out error, mean of {held} steps | {found.mean_error:.1%} | at most {BAR:.0%} | {verdict}\n")
    if options.out is not None:
        sys.stdout.write(f"for `weft sim --hardware {options.out}` and `weft up --cost-file {options.out}`\n")
    return 0


def calibrate(settings: WorkerSettings, step_logs: Sequence[Path] = ()) -> Calibration:
    """Measure an engine with these settings, or read what live workers with them wrote down.

    Raises:
        SettingsError: the engine or a log is of no use; says why.
    """
    # Only this needs torch.
    from worker_svc.torch_engine import load_engine

    logged = [Step(work, seconds) for path in step_logs for work, seconds in read_steps(path)]
    folder = read(settings.model)
    bench = Bench(load_engine(folder, settings), folder)
    pool = bench.engine.pool
    cost, spread, errors = judge(logged or bench.steps(bench.cells(settings)))
    hardware = Hardware(
        what=f"{folder.name} on {platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        cost=cost,
        kv_tokens=pool.num_blocks * pool.block_size,
        kv_bytes_per_token=max(1, bench.engine.block_bytes // pool.block_size),
        # The cells of the grid are the least of their times, of which no spread can be told.
        spread=spread if logged else (),
    )
    return Calibration(hardware, tuple(errors))


def judge(steps: Sequence[Step]) -> tuple[CostModel, tuple[float, ...], list[float]]:
    """Fit one half of the steps, every other one.

    Returns:
        The constants; what the fitted steps took over what these say, in 101 quantiles; and how far they are off for
        each step of the other half, as a share of the measured time.
    """
    cost = fit(steps[::2]).cost
    factors = sorted(1 / (1 + step.error(cost)) for step in steps[::2])
    spread = tuple(factors[round(share * (len(factors) - 1) / 100)] for share in range(101))
    return cost, spread, [abs(step.error(cost)) for step in steps[1::2]]


class Bench:
    """An engine, and steps of it that are timed."""

    def __init__(self, engine: Engine, folder: ModelFolder) -> None:
        self.engine = engine
        self._folder = folder
        self._root = chain_root(digest(folder))
        self._chance = random.Random(1)
        self._num_asked = 0

    def cells(self, settings: WorkerSettings) -> list[Cell]:
        """The cells of the grid that fit the settings, in an order by chance, so that every other one is like the rest.

        Raises:
            SettingsError: none fits.
        """
        grid = [Cell(1, new, cached) for new in PROMPTS for cached in CONTEXTS]
        grid += [Cell(count, new) for count, new in TOGETHER]
        grid += [Cell(0, 0, 0, count, max(context, BLOCK_SIZE)) for count in BATCHES for context in CONTEXTS]
        grid += [Cell(1, new, 0, count, context) for count, context, new in BESIDE]
        capacity = self.engine.pool.num_blocks * BLOCK_SIZE
        longest = min(self._folder.max_model_len, capacity)
        cells = [
            cell
            for cell in grid
            if cell.num_prompts + cell.num_sequences <= settings.max_num_seqs
            and cell.num_prompts * cell.num_new + cell.num_sequences <= settings.max_num_batched_tokens
            and max(cell.num_cached + cell.num_new, cell.context) + 4 * NUM_DECODES <= longest
            and cell.num_prompts * (cell.num_cached + cell.num_new) + cell.num_sequences * (cell.context + 64)
            < capacity
        ]
        if not cells:
            raise SettingsError("no step fits this engine: its memory or its budget is too small")
        self._chance.shuffle(cells)
        return cells

    def steps(self, cells: Sequence[Cell]) -> list[Step]:
        """The least that each cell took."""
        found = [[self._measure(cell) for cell in cells] for _ in range(NUM_PASSES)]
        return [min(those, key=lambda step: step.seconds) for those in zip(*found, strict=True)]

    def _measure(self, cell: Cell) -> Step:
        for number in range(cell.num_sequences):
            # The same ones in every pass, so that they are found in the cache and only the first pass computes them.
            self._ask(_tokens(random.Random(number), cell.context), 4 * NUM_DECODES)
        while any(sequence.num_uncomputed_tokens > 1 for sequence in [*self.engine.running, *self.engine.waiting]):
            self.engine.step()
        prompts = [_tokens(self._chance, cell.num_cached + cell.num_new) for _ in range(cell.num_prompts)]
        for prompt in prompts if cell.num_cached else ():
            self._ask(prompt[: cell.num_cached], 1)
            self._finish(cell.num_sequences)
        for prompt in prompts:
            self._ask(prompt, 1)
        step = min((self._step() for _ in range(1 if prompts else NUM_DECODES)), key=lambda step: step.seconds)
        self._drop_all()
        return step

    def _step(self) -> Step:
        began = time.perf_counter()
        self.engine.step()
        seconds = time.perf_counter() - began
        assert self.engine.landed is not None
        return Step(self.engine.landed, seconds)

    def _finish(self, num_others: int) -> None:
        """Step until only the others are left."""
        while len(self.engine.running) + len(self.engine.waiting) > num_others:
            self.engine.step()

    def _drop_all(self) -> None:
        from worker_svc.engine_io import Drop

        for sequence in [*self.engine.running, *self.engine.waiting]:
            self.engine.apply(Drop(sequence.request.request_id, 0))
        while self.engine.has_work:
            self.engine.step()

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


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(10, 1000) for _ in range(count)]


def _write(path: Path, hardware: Hardware) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(hardware)) + b"\n")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error}") from error
