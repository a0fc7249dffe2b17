"""Workloads as lists of arrivals: what was asked when, how long the answers were, and which blocks prompts share.

No trace has any text. Where it says which blocks of a prompt are those of others, they have ids; a block's id stands
for the block and all before it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import lzma
import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from lab.simulator import servegen
from weft.errors import SettingsError
from weft.hashing import HASH_BYTES

# Tokens of a block of Mooncake's traces.
MOONCAKE_BLOCK: Final = 512
# Of traces that share no blocks, where they are only memory. With the 16 tokens of a worker's a simulation takes three
# times as long and gives the same figures to three digits; with 512 a short conversation wastes a quarter of its
# memory.
UNSHARED_BLOCK: Final = 64
# Mooncake's conversation trace has all arrivals of about so many seconds at one moment.
MOONCAKE_TICK_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()  # of the prompt's blocks, the last one maybe partial; none if nothing is shared
    tenant: str = ""
    priority: int = 0
    slo_class: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How many requests are drawn, where a trace has no arrivals of its own."""

    rate_per_s: float = 10.0
    num_requests: int = 10_000
    seed: int = 0


DRAWING: Final = Drawing()


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in the order of their times."""

    name: str
    arrivals: tuple[Arrival, ...]
    block_size: int

    @property
    def duration_s(self) -> float:
        return self.arrivals[-1].at_s - self.arrivals[0].at_s if self.arrivals else 0.0

    @property
    def rate_rps(self) -> float:
        """Requests in a second, on average."""
        return len(self.arrivals) / self.duration_s if self.duration_s else math.inf

    def first(self, count: int) -> Trace:
        """Only so many requests."""
        return replace(self, arrivals=self.arrivals[:count])

    def faster(self, factor: float) -> Trace:
        """The same requests in less time."""
        return replace(self, arrivals=tuple(replace(arrival, at_s=arrival.at_s / factor) for arrival in self.arrivals))


def read(path: str | Path, *, spread: bool = True, drawn: Drawing = DRAWING) -> Trace:
    """Read a trace: Mooncake's or our own JSON lines, Azure's CSV, ServeGen's clients, lengths alone; `.xz` as well.

    Args:
        spread: arrivals of one moment of Mooncake's come evenly over the time until the next moment, as its times are
            rounded; otherwise as bursts.
        drawn: how arrivals are drawn where the file has none: ServeGen's from its clients' rates, and those of
            `num_prefill_tokens,num_decode_tokens` (Vidur) by a Poisson process.

    Raises:
        SettingsError: it cannot be read, or a line of it makes no sense; names file and line.
    """
    path = Path(path)
    if path.name.endswith((".tar", ".tar.xz", ".tar.gz")):
        return Trace(path.name.split(".")[0], tuple(_draw_clients(path, drawn)), UNSHARED_BLOCK)
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise SettingsError(f"trace {path} cannot be read: {error}") from error
    name = path.name.removesuffix(".xz").rsplit(".", 1)[0]
    if text.lstrip().startswith("{"):
        trace = _read_json_lines(name, text, path, spread=spread)
    elif text.startswith("TIMESTAMP"):
        trace = Trace(name, _in_order(_read_azure(text, path)), UNSHARED_BLOCK)
    elif text.startswith("num_prefill_tokens"):
        trace = Trace(name, tuple(_draw_poisson(text, path, drawn)), UNSHARED_BLOCK)
    elif not text.strip():
        raise SettingsError(f"trace {path} is empty")
    else:
        raise SettingsError(f"trace {path} is neither JSON lines, nor Azure's or Vidur's CSV, nor a tar of ServeGen's")
    if not trace.arrivals:
        raise SettingsError(f"trace {path} has no requests")
    return trace


def _in_order(arrivals: Iterable[Arrival]) -> tuple[Arrival, ...]:
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at_s))


def _read_json_lines(name: str, text: str, path: Path, *, spread: bool) -> Trace:
    rows: list[Arrival] = []
    block_sizes: set[int] = set()
    is_mooncake = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        with _naming(path, number):
            row = json.loads(line)
            is_mooncake = is_mooncake or "timestamp" in row
            block_sizes.add(MOONCAKE_BLOCK if "timestamp" in row else int(row.get("block_size", MOONCAKE_BLOCK)))
            rows.append(_checked(_read_row(row), max(block_sizes)))
            if len(block_sizes) > 1 or min(block_sizes) < 1:
                raise ValueError("a trace has one block_size, of at least 1 token")
    arrivals = _in_order(rows)
    if is_mooncake and spread:
        arrivals = tuple(_spread(arrivals))
    return Trace(name, arrivals, max(block_sizes, default=MOONCAKE_BLOCK))


def _read_row(row: Mapping[str, Any]) -> Arrival:
    if "timestamp" in row:
        return Arrival(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
    return Arrival(
        float(row["at_s"]),
        row["prompt_tokens"],
        row["output_tokens"],
        tuple(row.get("block_ids", ())),
        str(row.get("tenant", "")),
        int(row.get("priority", 0)),
        str(row.get("slo_class", "")),
    )


def _checked(arrival: Arrival, block_size: int) -> Arrival:
    """Raises: ValueError, says what is wrong with it."""
    lengths = arrival.num_prompt_tokens, arrival.num_output_tokens
    if not 0 <= arrival.at_s < math.inf:
        raise ValueError(f"its time is {arrival.at_s}")
    if any(type(length) is not int or length < 1 for length in lengths):
        raise ValueError("it needs a prompt and an output of at least 1 token each")
    if any(type(block_id) is not int or not 0 <= block_id < 2 ** (8 * HASH_BYTES) for block_id in arrival.block_ids):
        raise ValueError("block ids are whole numbers from 0 to 2^128")
    if len(arrival.block_ids) * block_size >= arrival.num_prompt_tokens + block_size:
        raise ValueError(f"it has more blocks of {block_size} tokens than its prompt")
    return arrival


@contextlib.contextmanager
def _naming(path: Path, number: int) -> Iterator[None]:
    """Errors of a line say which it is."""
    try:
        yield
    except KeyError as error:
        raise SettingsError(f"trace {path}, line {number} is not a request: it has no {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise SettingsError(f"trace {path}, line {number} is not a request: {error}") from error


def _spread(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    moments = [(at_s, list(group)) for at_s, group in itertools.groupby(arrivals, key=lambda arrival: arrival.at_s)]
    ends = [at_s for at_s, _ in moments[1:]] + [moments[-1][0] + MOONCAKE_TICK_S] if moments else []
    for (at_s, group), end in zip(moments, ends, strict=True):
        for i, arrival in enumerate(group):
            yield replace(arrival, at_s=at_s + min(end - at_s, MOONCAKE_TICK_S) * i / len(group))


def _read_azure(text: str, path: Path) -> Iterator[Arrival]:
    began: float | None = None
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        with _naming(path, number):
            # Seven digits of a second, of which Python knows six.
            at_s = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
            began = at_s if began is None else began
            # Some answers are empty.
            arrival = Arrival(at_s - began, int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
            yield _checked(arrival, UNSHARED_BLOCK)


def _draw_poisson(text: str, path: Path, drawn: Drawing) -> Iterator[Arrival]:
    """The lengths in the order of the file."""
    chance, at_s = random.Random(drawn.seed), 0.0
    for number, row in enumerate(itertools.islice(csv.DictReader(io.StringIO(text)), drawn.num_requests), 2):
        with _naming(path, number):
            arrival = Arrival(at_s, int(row["num_prefill_tokens"]), max(1, int(row["num_decode_tokens"])))
            yield _checked(arrival, UNSHARED_BLOCK)
        at_s += chance.expovariate(drawn.rate_per_s)


def _draw_clients(path: Path, drawn: Drawing) -> Iterator[Arrival]:
    clients = servegen.read(path)
    for request in servegen.draw(clients, drawn.rate_per_s, drawn.num_requests, random.Random(drawn.seed)):
        yield Arrival(request.at_s, request.num_prompt_tokens, request.num_output_tokens, tenant=request.client)


def lru_hit_ratio(trace: Trace, capacity_tokens: int | None) -> float:
    """Tokens of prompts that one cache of so many tokens would have had, as a share of all.

    Requests go in the order of the file; a hit is the longest prefix of block ids present, in tokens, at most the
    prompt; then every id is touched or inserted in order. The least recently used block goes first.
    """
    capacity = None if capacity_tokens is None else capacity_tokens // trace.block_size
    cached: OrderedDict[int, None] = OrderedDict()
    num_hit = num_all = 0
    for arrival in trace.arrivals:
        num_held = num_leading(arrival.block_ids, cached)
        num_hit += min(num_held * trace.block_size, arrival.num_prompt_tokens)
        num_all += arrival.num_prompt_tokens
        for block_id in arrival.block_ids:
            cached[block_id] = None
            cached.move_to_end(block_id)
            if capacity is not None and len(cached) > capacity:
                cached.popitem(last=False)
    return num_hit / num_all if num_all else 0.0


def num_leading(block_ids: Sequence[int], held: OrderedDict[int, None]) -> int:
    """How many of the first blocks are held."""
    return next((i for i, block_id in enumerate(block_ids) if block_id not in held), len(block_ids))
