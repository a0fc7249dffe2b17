"""What policies cost and what they gain: `python -m lab.policies [--only NAME] [--traces FOLDER] [--json FILE]`.

Decisions are timed in the scheduler's own state, whole traces in the simulator, and what users would notice in a mesh
on this machine, two settings in turn.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import uvloop
from tokenizers import Tokenizer

from lab import ring
from lab.client import Stream, complete
from lab.report import Figure, flags, measure, median_figure, say
from lab.simulator.hardware import HARDWARE
from lab.simulator.simulation import Fleet, Setup, simulate
from lab.simulator.trace import Arrival, Trace, read
from scheduler_svc.actions import Dispatch
from scheduler_svc.policies import CHOICES, PolicyMaker, PolicyNames
from scheduler_svc.policy.admit import Objectives
from scheduler_svc.state import ClusterState
from weft.hashing import BLOCK_SIZE, HASH_BYTES
from weft.limits import MAX_STOP_TOKEN_IDS
from weft.messages import Choice, KvEvents, SamplingParams, TokenizedRequest, WorkerStatus
from weft.model_folder import BUNDLED
from worker_svc.batch import Limits

HOST: Final = "127.0.0.1"
TRACES: Final = Path(__file__).parents[2] / "shared" / "traces"
CONVERSATION: Final = "mooncake_conversation_trace.jsonl.xz"
NUM_WORKERS: Final = 1000
NUM_BLOCKS: Final = 100_000
CHAIN: Final = 50
NUM_HELD: Final = 2000  # sent before the first that is timed
ROUND: Final = 200  # requests whose median is one figure


def placement(num_requests: int = 4000) -> list[Figure]:
    """One decision, from the request to the dispatch, over 1,000 workers that hold 100,000 blocks between them.

    With the default admission, without objectives and with some that every request meets.
    """
    return [
        _placement(route, objectives, num_requests)
        for route in CHOICES["route"]
        for objectives in ({}, {"": Objectives(ttft_s=1000.0, tbt_s=1000.0)})
    ]


def _placement(route: str, objectives: Mapping[str, Objectives], num_requests: int) -> Figure:
    """The least of the medians of rounds: a neighbour on the same core makes all of one take nearly twice as long."""
    state, chains, rng = _cluster(route, objectives)
    requests = [_request(number, rng.choice(chains), rng) for number in range(NUM_HELD + num_requests)]
    for request in requests[:NUM_HELD]:
        state.on_request(request, 0.5)
    seconds = []
    for request in requests[NUM_HELD:]:
        # CPU time, since the machine has other work.
        before = time.thread_time()
        (action,) = state.on_request(request, 1.0)
        seconds.append(time.thread_time() - before)
        assert isinstance(action, Dispatch)
    blocks = state.stats()["blocks"]
    medians = [statistics.median(seconds[start : start + ROUND]) * 1e6 for start in range(0, num_requests, ROUND)]
    note = f"{NUM_WORKERS} workers, {NUM_HELD} requests held, {blocks:.0f} blocks; medians of {len(medians)} rounds "
    note += f"{min(medians):.0f} to {max(medians):.0f} µs, p99 of all {_percentile(seconds, 99) * 1e6:.0f} µs"
    name = f"placement by {route}" + (" with objectives" if objectives else "")
    return Figure(name, min(medians), "µs", 100.0, note=note)


def _cluster(route: str, objectives: Mapping[str, Objectives]) -> tuple[ClusterState, list[list[int]], random.Random]:
    """Workers with some load, and chains of blocks that one to forty of them hold the beginning of."""
    rng = random.Random(1)
    state = ClusterState("s0", PolicyMaker(random.Random(2), objectives=objectives), PolicyNames(route=route))
    for i in range(NUM_WORKERS):
        state.on_status(_status(i, rng), 0.0)
    chains = [[0, *range(1 + start, CHAIN + start)] for start in range(0, NUM_BLOCKS, CHAIN - 1)]
    held: list[set[int]] = [set() for _ in range(NUM_WORKERS)]
    for chain in chains:
        count = rng.choice((1, 1, 2, 5, 40))
        for i, worker in enumerate(rng.sample(range(NUM_WORKERS), count)):
            # The first holder has all of it.
            held[worker].update(chain[: rng.randrange(1, CHAIN + 1) if i else CHAIN])
    for i, blocks in enumerate(held):
        state.on_kv(KvEvents(f"w{i}", 1, 1, b"".join(map(_block, sorted(blocks)))), 0.0)
    return state, chains, rng


def _status(number: int, rng: random.Random) -> WorkerStatus:
    return WorkerStatus(
        worker=f"w{number}",
        worker_epoch=1,
        model="m",
        state="ready",
        max_num_seqs=100_000,
        num_running=rng.randrange(40),
        num_waiting=0,
        num_waiting_tokens=rng.randrange(4000),
        num_blocks=1000,
        num_free_blocks=1000,
        accepted={},
        kv_sequence=0,
        prefill_tokens_per_s=5000.0,
        step_s=0.02,
    )


def _request(number: int, chain: list[int], rng: random.Random) -> TokenizedRequest:
    """A prompt of a known beginning and 14 blocks of its own."""
    blocks = [*chain, *range(10**9 + 20 * number, 10**9 + 20 * number + 14)]
    return TokenizedRequest(
        request_id=f"r{number}",
        epoch=0,
        gateway="g0",
        model="m",
        prompt_token_ids=bytes(4 * BLOCK_SIZE * len(blocks)),
        block_hashes=b"".join(map(_block, blocks)),
        sampling=SamplingParams(max_tokens=rng.randrange(1, 1000)),
        choices=[Choice(0, 0)],
    )


def _block(number: int) -> bytes:
    return number.to_bytes(HASH_BYTES, "big")


def simulator(traces: Path) -> list[Figure]:
    """The conversation trace through 16 workers by each route, and 10,000 workers against the clock."""
    hardware, figures = HARDWARE["a800"], []
    trace = read(traces / CONVERSATION)
    for route in CHOICES["route"]:
        setup = _setup(16, route)
        before = time.process_time()
        result = simulate(trace, setup)
        seconds = time.process_time() - before
        summary = result.summary()
        note = f"{len(trace.arrivals)} requests, mean TTFT {summary.ttft_mean_s:.2f} s, hits {summary.hit_ratio:.3f}"
        figures.append(Figure(f"16 simulated workers by {route}", seconds, "s", 10.0, note=note))
        say(f"  {route}: {seconds:.1f} s")
    fleet = _many(trace, 10_000, 60.0)
    before = time.process_time()
    result = simulate(fleet, _setup(10_000, PolicyNames().route))
    seconds = time.process_time() - before
    simulated = result.summary().duration_s
    note = f"{len(fleet.arrivals)} requests, {simulated:.0f} s simulated in {seconds:.0f} s; {hardware.what}"
    figures.append(Figure("10,000 simulated workers", simulated / seconds, "x real time", 1.0, "least", note=note))
    return figures


def _setup(num_workers: int, route: str) -> Setup:
    hardware = HARDWARE["a800"]
    fleet = Fleet(num_workers, hardware.cost, Limits(256, 2048), kv_tokens=3_000_000)
    return Setup(fleet, PolicyNames(admit="open", route=route))


def _many(trace: Trace, num_workers: int, seconds: float) -> Trace:
    """The trace's requests at the load of 16 workers each, for so many workers and seconds."""
    rng = random.Random(3)
    rate = len(trace.arrivals) / trace.duration_s * num_workers / 16
    arrivals: list[Arrival] = []
    for number in range(int(rate * seconds)):
        like = rng.choice(trace.arrivals)
        # Copies of the trace do not share blocks with each other.
        copy = 10**9 * (1 + number % (num_workers // 16))
        arrivals.append(
            Arrival(
                number / rate,
                like.num_prompt_tokens,
                like.num_output_tokens,
                tuple(copy + block_id for block_id in like.block_ids),
            )
        )
    return Trace(f"{trace.name}, {num_workers} workers", tuple(arrivals), trace.block_size)


def srpt(repeats: int = 3) -> list[Figure]:
    """Mean time to the end of an answer: srpt with lengths that it has to learn, against fcfs.

    Four in five requests are short and one in five is long; the long ones have longer prompts. Where an answer ends is
    for the model to say, by tokens that end it; nobody says how many there will be.
    """
    gains = []
    common = ("--max-num-seqs", "4", "--kv-offload", "never", "--prefix-cache", "false")
    with ring.running("--order", "fcfs", *common) as fcfs, ring.running("--order", "srpt", *common) as short_first:
        for repeat in range(repeats + 1):
            means = [uvloop.run(_mixed(mesh.port, repeat)) for mesh in (fcfs, short_first)]
            say(f"  mean completion: fcfs {means[0]:.2f} s, srpt {means[1]:.2f} s")
            # The first round is what the predictor learns from.
            if repeat:
                gains.append(means[0] / means[1])
    return [median_figure("mean completion: srpt before fcfs", gains, "x", bar=1.5, side="least")]


async def _mixed(port: int, seed: int, count: int = 80) -> float:
    rng = random.Random(seed)
    bodies = [_long(rng) if rng.random() < 0.2 else _short(rng) for _ in range(count)]
    streams = await asyncio.gather(*(complete(HOST, port, body) for body in bodies))
    assert all(stream.is_done for stream in streams)
    return statistics.mean(stream.ended_at - stream.sent_at for stream in streams)


def _short(rng: random.Random) -> dict[str, Any]:
    return _body(_tokens(rng, 16), max_tokens=384, stop_token_ids=_ends(), temperature=1.0)


def _long(rng: random.Random) -> dict[str, Any]:
    return _body(_tokens(rng, 300), max_tokens=384, ignore_eos=True)


@cache
def _ends() -> list[int]:
    """As many tokens as a request may name, of which one in ten of the model's texts are."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tales-6m" / "tokenizer.json"))
    counts = Counter(tokenizer.encode((BUNDLED / "heldout.txt").read_text(), add_special_tokens=False).ids)
    return [token_id for token_id, _ in counts.most_common()[60 : 60 + MAX_STOP_TOKEN_IDS]]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 4000) for _ in range(count)]


def _body(prompt: list[int], **rest: Any) -> dict[str, Any]:
    return {"model": "tales-6m", "prompt": prompt, "temperature": 0, **rest}


def chunked(repeats: int = 3) -> list[Figure]:
    """The 99th percentile of gaps of running streams while long prompts come: chunked against prefill_first."""
    gains: list[float] = []
    common = ("--kv-offload", "never", "--prefix-cache", "false")
    with (
        ring.running("--batching", "prefill_first", *common) as whole,
        ring.running("--batching", "chunked", "--max-num-batched-tokens", "128", *common) as pieces,
    ):
        for repeat in range(repeats + 1):
            gaps = [uvloop.run(_disturbed(mesh.port, repeat)) for mesh in (whole, pieces)]
            say(f"  gap p99: prefill_first {gaps[0] * 1e3:.0f} ms, chunked {gaps[1] * 1e3:.0f} ms")
            if repeat:
                gains.append(gaps[0] / gaps[1])
    return [median_figure("gap p99 with long prompts: prefill_first over chunked", gains, "x", bar=3.0, side="least")]


async def _disturbed(port: int, seed: int) -> float:
    """Seconds: of four streams beside which prompts of 1,900 tokens come one after the other."""
    rng = random.Random(seed)
    bodies = [_body(_tokens(rng, 16), max_tokens=300, ignore_eos=True) for _ in range(4)]
    streams = [asyncio.create_task(complete(HOST, port, body)) for body in bodies]
    while not all(stream.done() for stream in streams):
        await complete(HOST, port, _body(_tokens(rng, 1900), max_tokens=1))
    done: list[Stream] = [stream.result() for stream in streams]
    gaps = [b - a for stream in done for a, b in zip(stream.chunk_times, stream.chunk_times[1:], strict=False)]
    return _percentile(gaps, 99)


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))]


BENCHMARKS: Final[tuple[str, ...]] = ("placement", "simulator", "srpt", "chunked")


def main() -> None:
    assert __doc__ is not None
    parser = flags(BENCHMARKS, __doc__)
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the public traces (%(default)s)")
    options = parser.parse_args()
    benchmarks: dict[str, Callable[[], list[Figure]]] = {
        "placement": placement,
        "simulator": partial(simulator, options.traces),
        "srpt": srpt,
        "chunked": chunked,
    }
    measure(benchmarks, options)


if __name__ == "__main__":
    main()
