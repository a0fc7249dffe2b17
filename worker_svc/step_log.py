"""What each step of a worker computed and how long it took, as lines of a file: `weft calibrate --steps` reads them.

A step's time is all of the engine's thread: planning, computing, sampling, handing its tokens over. Of a thread that
had no pause it goes from the end of the step before to its own end, so that times add up to the time that passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec.structs import astuple, fields

from weft.errors import SettingsError
from worker_svc.batch import Work

COLUMNS: Final = (*(item.name for item in fields(Work)), "seconds")
HEAD: Final = ",".join(COLUMNS)


class StepLog:
    """A file of steps that grows by a line each."""

    def __init__(self, folder: str, instance: str) -> None:
        """Begin the file of this worker's life.

        Raises:
            SettingsError: it cannot be written.
        """
        path = Path(folder, f"{instance}.csv")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="ascii")
            self._file.write(HEAD + "\n")
        except OSError as error:
            raise SettingsError(f"step_log: {path} cannot be written: {error}") from error

    def add(self, work: Work, seconds: float) -> None:
        """Lines come to the disk in blocks."""
        values = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in astuple(work))
        self._file.write(f"{values},{seconds:.7f}\n")

    def close(self) -> None:
        self._file.close()


def read_steps(path: Path) -> Iterator[tuple[Work, float]]:
    """What a step log says.

    Raises:
        SettingsError: it cannot be read, or a line makes no sense; names file and line.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if lines[:1] != [HEAD]:
        raise SettingsError(f"{path} is no step log: its first line is not {HEAD}")
    for number, line in enumerate(lines[1:], start=2):
        try:
            new, seen, sequences, context, chunks, seconds = line.split(",")
            work = Work(int(new), float(seen), int(sequences), float(context), int(chunks))
            yield work, float(seconds)
        except ValueError as error:
            # A worker that was killed leaves half a line at the end.
            if number == len(lines):
                return
            raise SettingsError(f"{path}, line {number} is no step: {line!r}") from error
