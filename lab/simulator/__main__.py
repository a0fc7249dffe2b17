"""`weft sim` and `weft size`, also as `python -m lab.simulator sim|size`: what they print and write."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from lab.simulator import options
from lab.simulator.page import page
from lab.simulator.report import Heading, number, table, to_json
from lab.simulator.sweep import Case, Knobs, Row, find_size, play, play_all
from weft.errors import SettingsError, WeftError
from weft.exit_status import BAD_SETTINGS, FAILED, complain

CLEAR: Final = "\r\x1b[K"


def sim(argv: Sequence[str]) -> int:
    """Play every trace, preset and load; print one table."""
    try:
        given = options.sim_parser().parse_args(argv)
        knobs = options.read_knobs(given)
        for path in filter(None, (given.html, given.json)):
            _check_writable(path)
        cases = options.make_cases(options.read_traces(given), given, given.workers, knobs)
        with _progress(len(cases)) as tell:
            rows = play_all(cases, given.jobs, tell)
        names = " and ".join(dict.fromkeys(row.trace for row in rows))
        title = f"{names} on {rows[0].num_workers} simulated workers"
        heading = Heading(title, knobs.hardware.what, knobs.slo, shlex.join(["weft", "sim", *argv]))
        sys.stdout.write(table(heading, rows))
        if given.html:
            given.html.write_text(page(heading, rows), encoding="utf-8")
        if given.json:
            given.json.write_bytes(to_json(heading, rows))
    except WeftError as error:
        return complain("weft sim", error)
    return 0


def size(argv: Sequence[str]) -> int:
    """Look for the fewest workers that keep the objectives; print each number that is tried."""
    try:
        given = options.size_parser().parse_args(argv)
        knobs = options.read_knobs(given)
        if knobs.roles:
            raise SettingsError(
                "--roles: the preset divides the workers here, since their number is what is looked for"
            )
        case = options.make_cases(options.read_traces(given), given, 1, knobs)[0]
        wanted = f"{100 * given.share:g} % of {len(case.trace.arrivals):,} requests"
        sys.stdout.write(f"Of the workers looked for, each is {knobs.hardware.what}; wanted: {wanted} are good.\n")
        tried: list[int] = []
        answer = _search(case, knobs, given.share, given.max_workers, tried)
    except WeftError as error:
        return complain("weft size", error)
    if answer is None:
        why = "" if tried[-1] == given.max_workers else "; a quarter of them were no worse, so more will not help"
        sys.stderr.write(f"weft size: not even with {tried[-1]} workers are {wanted} good{why}\n")
        return FAILED
    sys.stdout.write("1 worker is enough.\n" if answer == 1 else f"{answer} workers are enough.\n")
    return 0


def _search(case: Case, knobs: Knobs, share: float, most: int, tried: list[int]) -> int | None:
    """Mutates: `tried`, to which each number of workers is added."""

    def share_with(num_workers: int) -> float:
        tried.append(num_workers)
        summary = play(options.with_workers(case, num_workers, knobs)).summary
        sys.stdout.write(
            f"{num_workers:5} workers: {100 * summary.share_good:5.1f} % good; p99 of time to first token "
            f"{number(summary.ttft_p99_s)} s, between tokens {number(summary.tbt_p99_s)} s; "
            f"{summary.num_refused:,} refused\n"
        )
        sys.stdout.flush()
        return summary.share_good

    return find_size(share_with, share, most)


def _check_writable(path: Path) -> None:
    """Before hours of simulation, not after them."""
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error}") from error


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, Row | None], None]]:
    """A line on a terminal that says how many runs have ended."""
    began = time.monotonic()

    def tell(num_ended: int, row: Row | None) -> None:
        last = f", last: {row.trace}, {row.preset}, load {row.load:g}" if row else ""
        seconds = time.monotonic() - began
        sys.stderr.write(f"{CLEAR}{num_ended} of {total} runs in {seconds:.0f} s{last}")
        sys.stderr.flush()

    if not sys.stderr.isatty():
        yield lambda num_ended, row: None
        return
    try:
        yield tell
    finally:
        sys.stderr.write(CLEAR)


def main(argv: Sequence[str]) -> int:
    commands = {"sim": sim, "size": size}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    sys.stderr.write("usage: python -m lab.simulator sim|size [OPTIONS]\n")
    return BAD_SETTINGS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
