"""Long prompts through an engine process: how fast they are read, and what memory that takes beside the KV cache."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Final

from lab import bare
from lab.bare import Bare
from lab.engine.models import NANO, folder
from lab.report import Figure, median_figure, say

SHAPE: Final = replace(NANO, max_len=32768)
LONG: Final = 32_000
# So many of these fill the cache before the long prompt comes: none of it then counts as growth.
SHORT: Final = 4_000
NUM_SHORT: Final = 8
# One head's scores of all tokens with all others would be 4 GiB.
MAX_GROWTH_MIB: Final = 300
# A token of the long prompt sees eight times as many as one of a short prompt.
MAX_SLOWDOWN: Final = LONG / SHORT


def long_context() -> list[Figure]:
    """Compute is quadratic in a prompt's length, memory must not be."""
    with folder(SHAPE) as path:
        flags = ("--model", str(path), "--load-format", "dummy", "--kv-offload", "never")
        with bare.process(*flags, "--kv-memory", str(SHAPE.max_len * SHAPE.token_bytes)) as engine:
            return _measure(engine)


def _measure(engine: Bare) -> list[Figure]:
    engine.seconds([_prompt(32)], [1])
    short_rates = [SHORT / engine.seconds([_prompt(SHORT)], [1]) for _ in range(NUM_SHORT)]
    before = _peak_bytes(engine.child.pid, is_reset=True)
    long_rate = LONG / engine.seconds([_prompt(LONG)], [1])
    growth = (_peak_bytes(engine.child.pid) - before) / 2**20
    name, slowdowns = f"{SHAPE.name}, prefill", [rate / long_rate for rate in short_rates]
    figures = [
        median_figure(f"{name} of {SHORT}", short_rates, "tokens/s"),
        Figure(f"{name} of {LONG}", long_rate, "tokens/s"),
        median_figure(f"{name}: a token of {LONG} before one of {SHORT}", slowdowns, "x", bar=MAX_SLOWDOWN),
        Figure(f"{name} of {LONG}: memory beside the KV cache", growth, "MiB", bar=MAX_GROWTH_MIB),
    ]
    for figure in figures:
        say(f"  {figure.line()}")
    return figures


def _prompt(count: int) -> list[int]:
    return random.choices(range(SHAPE.vocab_size), k=count)


def _peak_bytes(pid: int, *, is_reset: bool = False) -> int:
    """The most memory that a process had resident; with `is_reset` what it has now, where its next peak begins."""
    if is_reset:
        # Documented in proc(5): 5 makes the peak what is resident now.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
