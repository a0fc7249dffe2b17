"""What is asked of each server, and what is read off its streams.

W1: one stream, 128 tokens in, 128 out. W2: 16 at once, 128 in, 64 out. W3: 16 at once, 1,024 that all share and 32 of
their own in, 16 out. Greedy, without an end before the last token.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from lab.client import Stream, complete_all
from lab.report import percentile

HOST = "127.0.0.1"
# Every server serves its model under this name.
MODEL = "m"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are sent at the same instant."""

    name: str
    num_requests: int
    num_shared: int  # prompt tokens that all of them begin with
    num_own: int  # prompt tokens of each request alone
    num_output: int

    def prompts(self, seed: int, vocabulary: list[int]) -> list[list[int]]:
        """Token ids that no other seed gives, so that no prefix cache knows them from before."""
        generator = random.Random(seed)
        shared = generator.choices(vocabulary, k=self.num_shared)
        return [shared + generator.choices(vocabulary, k=self.num_own) for _ in range(self.num_requests)]


W1 = Workload("W1", 1, 0, 128, 128)
W2 = Workload("W2", 16, 0, 128, 64)
W3 = Workload("W3", 16, 1024, 32, 16)


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of a workload at one server."""

    total_s: float
    tokens_per_s: float  # output tokens of all streams
    itl_ms: float  # median gap between two events of a stream
    tpot_ms: float  # median over the streams of (last - first event) / (tokens - 1), whatever an event holds
    ttft_ms: float  # median


def run(workload: Workload, port: int, prompts: list[list[int]]) -> Measured:
    """Send the prompts and read the answers to their end.

    Raises:
        RuntimeError: an answer is an error, or not as long as was asked.
    """
    bodies = [_body(prompt, workload.num_output) for prompt in prompts]
    started = time.perf_counter()
    streams = uvloop.run(complete_all(HOST, port, bodies))
    total_s = time.perf_counter() - started
    for stream in streams:
        if stream.status != 200 or stream.completion_tokens != workload.num_output:
            raise RuntimeError(f"status {stream.status}, {stream.completion_tokens} tokens of {workload.num_output}")
    return summary(streams, total_s)


def summary(streams: list[Stream], total_s: float) -> Measured:
    """What a round took, in figures."""
    times = [stream.chunk_times for stream in streams]
    return Measured(
        total_s=total_s,
        tokens_per_s=sum(stream.completion_tokens for stream in streams) / total_s,
        itl_ms=1e3 * percentile([b - a for row in times for a, b in zip(row, row[1:], strict=False)], 50),
        tpot_ms=1e3 * statistics.median(_tpot_s(stream) for stream in streams),
        ttft_ms=1e3 * statistics.median(stream.ttft_s for stream in streams),
    )


def whole_words(folder: Path) -> list[int]:
    """The tokens that are a space and a word: text made of them becomes the same tokens again in any tokenizer."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return sorted(number for text, number in vocabulary.items() if re.fullmatch("\u0120[a-z]{2,}", text))


def _tpot_s(stream: Stream) -> float:
    return (stream.chunk_times[-1] - stream.chunk_times[0]) / (stream.completion_tokens - 1)


def _body(prompt: list[int], num_output: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": num_output, "temperature": 0, "ignore_eos": True}
