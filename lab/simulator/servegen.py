"""ServeGen's clients, and requests that are drawn from them (Xiang et al. 2025, "ServeGen").

The archive has two files for each client ("chunk"): windows of ten minutes with a rate, and the family and shape of the
gaps between arrivals; and windows of some hours with the distributions of lengths. A client's arrivals are a renewal
process of mean 1 on the client's own clock, which runs as fast as its rate says, so windows of any length keep their
rates and bursts go over their edges. The scale of the gaps in the files is not used: its mean is up to 200 times off
the rate beside it. Clients whose lengths the archive lacks are left out.
"""

from __future__ import annotations

import csv
import heapq
import io
import itertools
import json
import lzma
import math
import random
import re
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from weft.errors import SettingsError

_FILE: Final = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")
_ENTRY: Final = re.compile(r"(\d+): ([\d.eE+-]+)")
EMPTY: Final = "{}"


@dataclass(frozen=True, slots=True)
class Window:
    """How a client's requests come for a while."""

    start_s: float
    rate_per_s: float
    family: str  # of the gaps: Gamma or Weibull
    shape: float


@dataclass(slots=True)
class Client:
    """One client's windows, and the lengths of its requests by the start of their windows, as written."""

    name: str
    windows: list[Window]
    starts: list[float]
    lengths: list[tuple[str, str]]  # of prompts and of outputs
    _read: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    def draw_lengths(self, at_s: float, chance: random.Random) -> tuple[int, int]:
        """Tokens of a prompt and of its output, by the window before `at_s`, or the first one there is."""
        prompts, outputs = self.lengths[max(0, bisect_right(self.starts, at_s) - 1)]
        return self._draw(prompts, chance), self._draw(outputs, chance)

    def _draw(self, text: str, chance: random.Random) -> int:
        if text not in self._read:
            entries = [(int(length), float(share)) for length, share in _ENTRY.findall(text)]
            self._read[text] = [length for length, _ in entries], list(itertools.accumulate(s for _, s in entries))
        values, shares = self._read[text]
        return max(1, chance.choices(values, cum_weights=shares)[0])


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """One that was drawn."""

    at_s: float
    client: str
    num_prompt_tokens: int
    num_output_tokens: int


def read(path: Path) -> list[Client]:
    """Clients of an archive, those with both files.

    Raises:
        SettingsError: it cannot be read, or a line makes no sense; names file and line.
    """
    windows: dict[str, list[Window]] = {}
    lengths: dict[str, list[tuple[float, str, str]]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                match = _FILE.search(member.name)
                content = archive.extractfile(member) if match else None
                if match is None or content is None:
                    continue
                where, text = f"{path}, {member.name}", content.read().decode()
                if match[2] == "trace.csv":
                    windows[match[1]] = list(_read_windows(text, where))
                else:
                    lengths[match[1]] = _read_lengths(text, where)
    except tarfile.TarError as error:
        # Its message has a line for each way to compress.
        raise SettingsError(f"trace {path} cannot be read: it is no whole tar file") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise SettingsError(f"trace {path} cannot be read: {error}") from error
    names = sorted((name for name in windows if lengths.get(name)), key=int)
    if not names:
        raise SettingsError(f"trace {path} has no clients: no chunk-N-trace.csv with lengths in chunk-N-dataset.json")
    return [
        Client(f"client-{name}", windows[name], [row[0] for row in lengths[name]], [row[1:] for row in lengths[name]])
        for name in names
    ]


def draw(clients: Sequence[Client], rate_per_s: float, count: int, chance: random.Random) -> list[Request]:
    """Requests of the first `count / rate_per_s` seconds, in which all clients' rates are scaled to have that mean.

    So there are about `count`, and not more.

    Raises:
        SettingsError: no client has a rate then.
    """
    end_s = count / rate_per_s
    total = sum(_num_expected(client, end_s) for client in clients)
    if not total:
        raise SettingsError(f"no client of the trace has any requests in its first {end_s:.0f} s")
    # Every client has its own chance, so that one client's requests are the same whoever else is there.
    streams = [_requests(client, count / total, random.Random(chance.getrandbits(64))) for client in clients]
    return list(itertools.islice(heapq.merge(*streams), count))


def _num_expected(client: Client, end_s: float) -> float:
    pairs = itertools.pairwise(client.windows)
    return sum(window.rate_per_s * max(0.0, min(after.start_s, end_s) - window.start_s) for window, after in pairs)


def _requests(client: Client, scale: float, chance: random.Random) -> Iterator[Request]:
    # On the client's clock, begun at a random moment of a gap.
    left: float | None = None
    for window, after in itertools.pairwise(client.windows):
        rate, at_s = scale * window.rate_per_s, window.start_s
        while rate > 0:
            if left is None:
                left = _gap(window, chance) * chance.random()
            if at_s + left / rate >= after.start_s:
                left -= (after.start_s - at_s) * rate
                break
            at_s += left / rate
            yield Request(at_s, client.name, *client.draw_lengths(at_s, chance))
            left = _gap(window, chance)


def _gap(window: Window, chance: random.Random) -> float:
    """Of mean 1."""
    if window.family == "Weibull":
        return chance.weibullvariate(1 / math.gamma(1 + 1 / window.shape), window.shape)
    return chance.gammavariate(window.shape, 1 / window.shape)


def _read_windows(text: str, where: str) -> Iterator[Window]:
    before = -math.inf
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        try:
            start_s, rate_per_s, family, shape = float(row[0]), float(row[1]), row[3], float(row[4])
            # A window without requests has neither.
            if rate_per_s and (family not in ("Gamma", "Weibull") or not 0 < shape < math.inf):
                raise ValueError(f"gaps are {family or 'nothing'} of shape {shape}")
            if not before < start_s < math.inf or not 0 <= rate_per_s < math.inf:
                raise ValueError("windows follow each other, at rates of at least 0")
        except (ValueError, IndexError) as error:
            raise SettingsError(f"trace {where}, line {number} is not a window: {error}") from error
        before = start_s
        yield Window(start_s, rate_per_s, family, shape)


def _read_lengths(text: str, where: str) -> list[tuple[float, str, str]]:
    """Those windows that have any."""
    try:
        rows = [(float(start), row["input_tokens"], row["output_tokens"]) for start, row in json.loads(text).items()]
        found = [row for row in rows if row[1] != EMPTY and row[2] != EMPTY]
        if not all(_ENTRY.search(row[1]) and _ENTRY.search(row[2]) for row in found):
            raise ValueError("a window's lengths are not {length: share, ...}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"trace {where} has no lengths: {error!r}") from error
    return sorted(found)
