"""The constants of the cost formula from measured steps: non-negative least squares of relative errors.

Relative, since a step of 30 ms that is off by 3 ms is as wrong as one of 3 s that is off by 0.3 s. There are so few
constants that every set of them that may be above zero is tried, which finds the optimum. `python -m lab.simulator.fit
FILE` prints the fits of every model, machine and degree of parallelism in splitwise-sim's table (Patel et al. 2024).
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

from scheduler_svc.cost_model import CostModel
from weft.errors import SettingsError
from worker_svc.batch import Work

NUM_CONSTANTS: Final = 6
# Of the scaled normal equations; what is smaller than it cannot be told from zero.
SINGULAR: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Step:
    """A measured step: what was computed, and what the clock said."""

    work: Work
    seconds: float

    @property
    def terms(self) -> tuple[float, ...]:
        """What the constants are multiplied with, in the order of `CostModel`."""
        work = self.work
        return 1.0, work.num_new, work.num_seen, work.num_context_tokens, work.num_sequences, work.num_chunks

    def error(self, cost: CostModel) -> float:
        """How far the formula is off, as a share of what the clock said; above 0 if it says too much."""
        return step_s(cost, self.work) / self.seconds - 1


def step_s(cost: CostModel, work: Work) -> float:
    """What the formula says of a step."""
    prefill_s = cost.chunk_s * work.num_chunks + cost.token_s * work.num_new + cost.attention_s * work.num_seen
    return cost.overhead_s + prefill_s + cost.decode_s(work.num_sequences, work.num_context_tokens)


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants, and how far they are off over the steps they were fitted to, as shares of the measured times."""

    cost: CostModel
    median_error: float
    worst_error: float


def fit(steps: Sequence[Step]) -> Fit:
    """The constants that make the sum of squared relative errors least.

    Raises:
        SettingsError: there are no steps, or one took no time.
    """
    if not steps or min(step.seconds for step in steps) <= 0:
        raise SettingsError("a cost model is fitted to steps that took time, and there are none")
    rows = [[term / step.seconds for term in step.terms] for step in steps]
    scales = [max(row[i] for row in rows) or 1.0 for i in range(NUM_CONSTANTS)]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    best = min(_candidates(scaled), key=lambda constants: _squares(scaled, constants))
    constants = [value / scale for value, scale in zip(best, scales, strict=True)]
    cost = CostModel(*constants)
    errors = sorted(abs(step.error(cost)) for step in steps)
    return Fit(cost, errors[len(errors) // 2], errors[-1])


def _candidates(rows: Sequence[Sequence[float]]) -> Iterator[list[float]]:
    """The least squares over every set of constants, where none comes out below zero."""
    products = [[sum(row[i] * row[j] for row in rows) for j in range(NUM_CONSTANTS)] for i in range(NUM_CONSTANTS)]
    sums = [sum(row[i] for row in rows) for i in range(NUM_CONSTANTS)]
    yield [0.0] * NUM_CONSTANTS
    for size in range(1, NUM_CONSTANTS + 1):
        for chosen in itertools.combinations(range(NUM_CONSTANTS), size):
            solved = _solve([[products[i][j] for j in chosen] for i in chosen], [sums[i] for i in chosen])
            if solved is not None and min(solved) >= 0:
                constants = [0.0] * NUM_CONSTANTS
                for i, value in zip(chosen, solved, strict=True):
                    constants[i] = value
                yield constants


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss's elimination with the largest pivot; None for a singular matrix."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    largest = max(abs(value) for row in matrix for value in row)
    for i in range(size):
        pivot = max(range(i, size), key=lambda j: abs(rows[j][i]))
        if abs(rows[pivot][i]) <= SINGULAR * largest:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(size):
            if j != i:
                factor = rows[j][i] / rows[i][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def _squares(rows: Sequence[Sequence[float]], constants: Sequence[float]) -> float:
    return sum((_dot(row, constants) - 1) ** 2 for row in rows)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


# ---- measurements of others ----


def splitwise_steps(path: Path) -> dict[str, list[Step]]:
    """Steps of splitwise-sim's `perf_model.csv` by "model machine tpN": each row has a prefill and a mean decode.

    Repeats of the same work become one step of their mean time.

    Raises:
        SettingsError: it cannot be read, or a line makes no sense; names file and line.
    """
    measured: dict[str, dict[Work, list[float]]]
    measured = defaultdict(lambda: defaultdict(list))
    try:
        reader = csv.DictReader(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    try:
        for row in reader:
            name = f"{row['model']} {row['hardware']} tp{row['tensor_parallel']}"
            for work, milliseconds in _splitwise_row(row):
                measured[name][work].append(float(milliseconds) / 1e3)
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path}, line {reader.line_num} is not a measurement: {error!r}") from error
    return {
        name: [Step(work, sum(times) / len(times)) for work, times in works.items()] for name, works in measured.items()
    }


def _splitwise_row(row: dict[str, str]) -> Iterator[tuple[Work, str]]:
    """The work of its two steps, and their times."""
    prompt, batch, num_new = int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"])
    yield Work(prompt * batch, batch * prompt**2 / 2, num_chunks=batch), row["prompt_time"]
    # The table has one time for all tokens of an answer: its contexts are half grown on average.
    yield Work(num_sequences=batch, num_context_tokens=batch * (prompt + num_new / 2)), row["token_time"]


def distserve_cost(path: Path, model: str, num_cards: int) -> CostModel:
    """DistServe's fit of a model on so many cards, in our form: one overhead, the mean of its two.

    Raises:
        SettingsError: it cannot be read, or has no such fit.
    """
    try:
        fitted = json.loads(path.read_text())[model][str(num_cards)]
        prefill_s, token_s, squared_s = (value / 1e3 for value in fitted["prefill"])
        # That of batches of at most 95 sequences.
        decode_s, context_s, sequence_s = (value / 1e3 for value in fitted["decoding_smallbs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} has no fit for {model} on {num_cards} cards: {error!r}") from error
    # It multiplies n^2 where we multiply n^2 / 2.
    return CostModel((prefill_s + decode_s) / 2, token_s, 2 * squared_s, context_s, sequence_s)


def main(argv: Sequence[str]) -> None:
    for name, steps in splitwise_steps(Path(argv[0])).items():
        found = fit(steps)
        constants = ", ".join(f"{value:.4g}" for value in astuple(found.cost))
        errors = f"median error {found.median_error:.1%}, worst {found.worst_error:.1%}"
        sys.stdout.write(f"{name}: {constants}; {errors} over {len(steps)} steps\n")


if __name__ == "__main__":
    main(sys.argv[1:])
