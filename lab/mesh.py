"""What the mesh costs and what its engine gains, on this machine: `python -m lab.mesh [--only NAME] [--json FILE]`.

Each benchmark starts what it measures afresh; two things that are compared run in turn, and the median of the ratios
counts. The load client runs on the same cores.
"""

from __future__ import annotations

import csv
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from lab import bare, ring
from lab.client import Stream, complete, complete_all
from lab.report import Figure, median_figure, percentile, run, say
from weft.model_folder import read
from weft.settings import ModelSettings

MODEL = "tales-6m"
HOST = "127.0.0.1"
TRACE = Path(__file__).parent.parent.parent / "shared" / "traces" / "azure_llm_2023_conv.csv"


def added_latency() -> list[Figure]:
    """Time from a request to the first byte of its answer; the engine answers at once, so all of it is the mesh."""
    with ring.running("--engine", "null", "--null-tokens-per-s", "1000") as mesh:

        async def load() -> list[float]:
            times = []
            for number in range(600):
                stream = await complete(HOST, mesh.port, _body(_prompt(number, 16), 1))
                times.append(stream.ttft_s * 1e3)
            return times[100:]

        times = uvloop.run(load())
    note = f"{len(times)} requests, one at a time"
    return [
        Figure("time to first byte added, p50", percentile(times, 50), "ms", 2.0, note=note),
        Figure("time to first byte added, p99", percentile(times, 99), "ms", 6.0, note=note),
    ]


def many_streams(num_streams: int = 256, rate: float = 30.0, seconds: float = 20.0) -> list[Figure]:
    """Many paced streams at once: does each keep its pace, and what does a token cost the gateway?"""
    num_tokens = int(rate * seconds)
    flags = ("--engine", "null", "--null-tokens-per-s", str(rate), "--max-num-seqs", str(2 * num_streams))
    with ring.running(*flags) as mesh:

        async def load() -> list[Stream]:
            await complete(HOST, mesh.port, _body(_prompt(0, 16), 8))
            return await complete_all(
                HOST, mesh.port, [_body(_prompt(number, 16), num_tokens) for number in range(num_streams)]
            )

        before = mesh.cpu_s("gateway")
        streams = uvloop.run(load())
        gateway_s = mesh.cpu_s("gateway") - before
    total = num_streams * num_tokens
    received = sum(stream.completion_tokens for stream in streams)
    paces = [(num_tokens - 1) / (stream.ended_at - stream.chunk_times[0]) / rate for stream in streams]
    gaps = [(b - a) * 1e3 for s in streams for a, b in zip(s.chunk_times, s.chunk_times[1:], strict=False)]
    note = f"{num_streams} streams at {rate:g} tokens/s for {seconds:g} s"
    return [
        Figure("tokens lost", float(total - received), "", 0.0, note=note),
        Figure("slowest stream's pace", min(paces), "x of its pace", 0.97, "least", note=note),
        Figure("gateway CPU a token", gateway_s / received * 1e6, "µs", 25.0, note=note),
        Figure("gap between tokens, p99", percentile(gaps, 99), "ms", note=f"pace {1e3 / rate:.1f} ms"),
    ]


def mesh_against_engine(repeats: int = 15, concurrent: int = 16) -> list[Figure]:
    """The same prompts through the whole mesh and through the engine alone in one process, in turn."""
    ratios, meshes, engines = [], [], []
    flags = ("--prefix-cache", "false", "--kv-offload", "never")
    with ring.running(*flags) as mesh, bare.process(*flags) as engine:
        for repeat in range(repeats + 1):
            prompts = [_prompt(1000 * repeat + number, 64) for number in range(concurrent)]
            seconds, tokens = _timed_mesh(mesh.port, prompts, 128)
            through_mesh = tokens / seconds
            alone = engine.tokens_per_s(prompts, 128)
            say(f"  mesh {through_mesh:.0f}, engine {alone:.0f} tokens/s")
            if repeat:
                ratios.append(through_mesh / alone)
                meshes.append(through_mesh)
                engines.append(alone)
    note = f"mesh {statistics.median(meshes):.0f}, engine {statistics.median(engines):.0f} tokens/s"
    return [median_figure("whole mesh against bare engine", ratios, "x", bar=0.9, side="least", note=note)]


def continuous_against_static(repeats: int = 3, batch: int = 16) -> list[Figure]:
    """Continuous batching against static batches, on lengths of the Azure conversation trace, scaled down.

    A static batch is padded, as `transformers.generate` pads it: every prompt to the longest of the batch, every row
    computed until the last has ended. Without the padding, ended rows cost nothing, which no batch on a GPU has.
    """
    lengths = _conversation_lengths(6 * batch)
    prompts = [_prompt(number, prompt) for number, (prompt, _) in enumerate(lengths)]
    outputs = [output for _, output in lengths]
    useful = sum(outputs)
    padded_prompts, padded_outputs = _padded(prompts, outputs, batch)
    padded, unpadded, note = [], [], ""
    with (
        bare.process("--batching", "chunked", "--max-num-seqs", str(batch)) as chunked,
        bare.process("--batching", "static", "--max-num-seqs", str(batch)) as static,
    ):
        for _ in range(repeats):
            continuous_s = chunked.seconds(prompts, outputs)
            padded_s = static.seconds(padded_prompts, padded_outputs)
            unpadded_s = static.seconds(prompts, outputs)
            note = f"{useful / continuous_s:.0f} against {useful / padded_s:.0f} tokens/s, batches of {batch}"
            say(f"  {note}")
            padded.append(padded_s / continuous_s)
            unpadded.append(unpadded_s / continuous_s)
    return [
        median_figure("continuous against static batching", padded, "x", bar=2.0, side="least", note=note),
        median_figure("the same, static without padding", unpadded, "x"),
    ]


def _padded(prompts: list[list[int]], outputs: list[int], batch: int) -> tuple[list[list[int]], list[int]]:
    """Every batch filled up to its longest prompt and its longest output."""
    filled, ends = [], []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        longest = max(len(prompt) for prompt in group)
        filled += [prompt + _prompt(10_000 + start + i, longest - len(prompt)) for i, prompt in enumerate(group)]
        ends += [max(outputs[start : start + batch])] * len(group)
    return filled, ends


def prefix_cache(repeats: int = 3, concurrent: int = 16) -> list[Figure]:
    """Time to first token of requests that share 1,024 tokens, and what the cache costs where nothing is shared."""
    gains, costs = [], []
    common = ("--kv-offload", "never")
    with (
        ring.running("--prefix-cache", "true", *common) as cached,
        ring.running("--prefix-cache", "false", *common) as plain,
    ):
        for repeat in range(repeats + 1):
            shared = _prompt(77 + repeat, 1024)
            prompts = [shared + _prompt(5000 + 100 * repeat + number, 32) for number in range(concurrent)]
            with_cache = _mean_ttft(cached.port, prompts)
            without = _mean_ttft(plain.port, prompts)
            say(f"  first token: {with_cache * 1e3:.0f} ms with, {without * 1e3:.0f} ms without")
            if repeat:
                gains.append(without / with_cache)
    with (
        bare.process("--prefix-cache", "true") as cached_engine,
        bare.process("--prefix-cache", "false") as plain_engine,
    ):
        for repeat in range(8 * repeats + 1):
            prompts = [_prompt(9000 + 100 * repeat + number, 128) for number in range(concurrent)]
            order = (cached_engine, plain_engine) if repeat % 2 else (plain_engine, cached_engine)
            speeds = {engine: engine.tokens_per_s(prompts, 64) for engine in order}
            if repeat:
                costs.append(100 * (1 - speeds[cached_engine] / speeds[plain_engine]))
    return [
        median_figure("prefix cache: faster first token, 1,024 shared", gains, "x", bar=5.0, side="least"),
        median_figure("prefix cache: cost at 0 % hits", costs, "%", bar=1.0),
    ]


def start_to_first_token(repeats: int = 3) -> list[Figure]:
    """From `weft up` to the first token of the bundled model, files in the page cache."""
    times = []
    for repeat in range(repeats + 1):
        with ring.running() as mesh:
            stream = uvloop.run(complete(HOST, mesh.port, _body(_prompt(repeat, 16), 4)))
            if repeat:
                times.append(stream.chunk_times[0] - mesh.started_at)
    return [median_figure("weft up to first token", times, "s", bar=10.0)]


def clean_checkout() -> list[Figure]:
    """`make test` in a fresh clone, installing included."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory(prefix="weft-clone-") as folder:
        subprocess.run(["git", "clone", "--quiet", str(root), folder], check=True)
        started = time.perf_counter()
        install = subprocess.run(["make", "install"], cwd=folder, capture_output=True, text=True, check=False)
        installed = time.perf_counter()
        test = subprocess.run(["make", "test"], cwd=folder, capture_output=True, text=True, check=False)
        ended = time.perf_counter()
        shutil.rmtree(Path(folder) / ".venv", ignore_errors=True)
    if install.returncode or test.returncode:
        sys.stderr.write(install.stderr + test.stdout[-4000:])
        raise RuntimeError("make test failed in a fresh clone")
    last = test.stdout.strip().splitlines()[-1]
    return [
        Figure("make test, from a clean checkout", ended - started, "s", 360.0, note=last),
        Figure("the suite itself", ended - installed, "s", 120.0),
    ]


def _timed_mesh(port: int, prompts: list[list[int]], num_tokens: int) -> tuple[float, int]:
    started = time.perf_counter()
    streams = uvloop.run(complete_all(HOST, port, [_body(prompt, num_tokens) for prompt in prompts]))
    return time.perf_counter() - started, sum(stream.completion_tokens for stream in streams)


def _mean_ttft(port: int, prompts: list[list[int]]) -> float:
    streams = uvloop.run(complete_all(HOST, port, [_body(prompt, 4) for prompt in prompts]))
    return statistics.mean(stream.ttft_s for stream in streams)


def _body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


def _prompt(seed: int, length: int) -> list[int]:
    """Token ids that no other seed gives, so that nothing is shared by accident."""
    generator = random.Random(seed)
    vocab_size = read(ModelSettings()).vocab_size
    return [generator.randrange(300, vocab_size) for _ in range(length)]


def _conversation_lengths(count: int, scale: int = 8) -> list[tuple[int, int]]:
    """Prompt and output lengths of the trace's first requests, divided by `scale`."""
    with TRACE.open() as source:
        rows = [row for row, _ in zip(csv.DictReader(source), range(count), strict=False)]
    return [(max(1, int(row["ContextTokens"]) // scale), max(1, int(row["GeneratedTokens"]) // scale)) for row in rows]


BENCHMARKS: dict[str, Callable[[], list[Figure]]] = {
    "added_latency": added_latency,
    "many_streams": many_streams,
    "mesh_against_engine": mesh_against_engine,
    "continuous_against_static": continuous_against_static,
    "prefix_cache": prefix_cache,
    "start_to_first_token": start_to_first_token,
    "clean_checkout": clean_checkout,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__ or "")
