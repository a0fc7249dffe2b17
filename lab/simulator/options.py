"""What `weft sim` and `weft size` are told, read once into what the sweep plays."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from lab.simulator import hardware, trace
from lab.simulator.record import Slo
from lab.simulator.sweep import ORACLE, Case, Knobs, make_setup
from lab.simulator.trace import Drawing, Trace
from scheduler_svc.objective import parse_objectives
from scheduler_svc.policies import CHOICES
from weft.errors import InvalidRequest, SettingsError
from weft.messages import WorkerRole
from weft.presets import PRESETS
from worker_svc.batch import POLICIES, RESERVATIONS

DEFAULT_SLO: Final = "ttft=1,tbt=0.1"
ROLES: Final[tuple[WorkerRole, ...]] = ("both", "prefill", "decode")
_SIM: Final = "Play traces through simulated workers: the policies that ship decide, a formula takes the GPU's time."
_POOL: Final = "of KV in memory that all workers share (default: as much as all their own, if the preset has such)"
_SIZE: Final = "Say how many workers a trace needs for a share of its requests to keep the objectives."


class Parser(argparse.ArgumentParser):
    """One whose mistakes are ours."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see `{self.prog} --help`)")


def sim_parser() -> Parser:
    parser = _parser("weft sim", _SIM, "+")
    parser.add_argument("--workers", type=_count, default=16, metavar="N", help="how many workers (default: 16)")
    parser.add_argument(
        "--preset",
        nargs="+",
        default=["weft"],
        choices=PRESETS,
        metavar="NAME",
        help=f"systems to play, side by side: {', '.join(PRESETS)} (default: weft)",
    )
    parser.add_argument(
        "--load",
        nargs="+",
        type=_factor,
        default=[1.0],
        metavar="X",
        help="multiples of the trace's own rate, a run each (default: 1)",
    )
    fleet = _add_fleet(parser)
    fleet.add_argument("--roles", nargs="+", metavar="ROLE=N", help="instead of --workers: prefill=8 decode=8")
    out = parser.add_argument_group("results")
    out.add_argument("--html", type=Path, metavar="FILE", help="write a page of charts over the loads")
    out.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every run")
    out.add_argument(
        "--jobs",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs at a time, each in a process (default: one for each CPU)",
    )
    return parser


def size_parser() -> Parser:
    parser = _parser("weft size", _SIZE, 1)
    parser.add_argument(
        "--share", type=_share, default=0.95, metavar="X", help="of requests that keep them (default: 0.95)"
    )
    parser.add_argument(
        "--max-workers", type=_count, default=4096, metavar="N", help="where to give up (default: 4096)"
    )
    parser.add_argument(
        "--preset",
        nargs=1,
        default=["weft"],
        choices=PRESETS,
        metavar="NAME",
        help=f"the system to play: {', '.join(PRESETS)} (default: weft)",
    )
    parser.add_argument(
        "--load",
        nargs=1,
        type=_factor,
        default=[1.0],
        metavar="X",
        help="a multiple of the trace's own rate (default: 1)",
    )
    _add_fleet(parser)
    # The preset divides the workers, whose number is what is looked for.
    parser.set_defaults(roles=None)
    return parser


def _parser(prog: str, description: str, num_traces: int | str) -> Parser:
    parser = Parser(prog=prog, usage="%(prog)s --trace FILE [OPTIONS]", description=description, allow_abbrev=False)
    parser.add_argument(
        "--trace",
        nargs=num_traces,
        required=True,
        metavar="FILE",
        help="requests: Mooncake's or our JSON lines, Azure's or Vidur's CSV (these may be .xz), a tar of ServeGen's",
    )
    parser.add_argument(
        "--slo",
        action="append",
        metavar="NAME=S",
        help=f"what makes a request a good one, in seconds: ttft=S, tbt=S (default: {DEFAULT_SLO})",
    )
    return parser


def _add_fleet(parser: Parser) -> argparse._ArgumentGroup:
    fleet = parser.add_argument_group("workers")
    names = ", ".join(hardware.HARDWARE)
    fleet.add_argument(
        "--hardware", default="h100", metavar="NAME|FILE", help=f"{names}, or a JSON file (default: h100)"
    )
    fleet.add_argument("--kv-tokens", type=_count, metavar="N", help="of KV that a worker's own memory holds")
    fleet.add_argument(
        "--pool-tokens", type=_amount, metavar="N", help="of KV in memory that workers share; 0 for none"
    )
    fleet.add_argument(
        "--link-gbit", type=_factor, default=100.0, metavar="X", help="Gbit/s of a worker's link (default: 100)"
    )
    policies = parser.add_argument_group("decisions, instead of the preset's")
    families = "; ".join(f"{family}: {', '.join(known)}" for family, known in CHOICES.items())
    policies.add_argument("--policy", nargs="+", action="extend", metavar="FAMILY=NAME", help=f"{families}, {ORACLE}")
    policies.add_argument("--batching", choices=POLICIES, metavar="NAME", help=", ".join(POLICIES))
    policies.add_argument("--reserve", choices=RESERVATIONS, metavar="NAME", help=", ".join(RESERVATIONS))
    policies.add_argument("--max-num-batched-tokens", type=_count, metavar="N", help="in a step")
    policies.add_argument("--max-num-seqs", type=_count, metavar="N", help="that run at once on a worker")
    requests = parser.add_argument_group("requests")
    requests.add_argument("--limit", type=_count, metavar="N", help="only the first so many")
    requests.add_argument(
        "--rate", type=_factor, default=10.0, metavar="X", help="a second, where a trace has no own (10)"
    )
    requests.add_argument("--seed", type=_amount, default=0, metavar="N", help="of what is drawn (default: 0)")
    requests.add_argument("--bursts", action="store_true", help="keep Mooncake's rounded times: many at one moment")
    requests.add_argument(
        "--says-max-tokens", action="store_true", help="requests state the length of their answers, as max_tokens"
    )
    return fleet


# ---- what they mean ----


def read_traces(options: argparse.Namespace) -> list[Trace]:
    """Raises: SettingsError."""
    drawing = Drawing(options.rate, options.limit or trace.DRAWING.num_requests, options.seed)
    traces = [trace.read(path, spread=not options.bursts, drawn=drawing) for path in options.trace]
    return [found.first(options.limit) if options.limit else found for found in traces]


def read_knobs(options: argparse.Namespace) -> Knobs:
    """Raises: SettingsError."""
    return Knobs(
        hardware=hardware.find(options.hardware),
        slo=read_slo(",".join(options.slo) if options.slo else DEFAULT_SLO),
        policies=_read_pairs(options.policy, "--policy", "FAMILY=NAME"),
        roles=_read_roles(options.roles),
        batching=options.batching,
        reserve=options.reserve,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_tokens=options.kv_tokens,
        pool_tokens=options.pool_tokens,
        link_bytes_per_s=options.link_gbit * 1e9 / 8,
        says_max_tokens=options.says_max_tokens,
        seed=options.seed,
    )


def make_cases(traces: Sequence[Trace], options: argparse.Namespace, num_workers: int, knobs: Knobs) -> list[Case]:
    """A run for each trace, preset and load, in this order. Raises: SettingsError."""
    try:
        return [
            Case(found, name, load, make_setup(found, PRESETS[name], num_workers, knobs))
            for found in traces
            for name in options.preset
            for load in sorted(options.load)
        ]
    except InvalidRequest as error:
        raise SettingsError(error.message) from error


def with_workers(case: Case, num_workers: int, knobs: Knobs) -> Case:
    """The same run, but for the number of workers."""
    return replace(case, setup=make_setup(case.trace, PRESETS[case.preset], num_workers, knobs))


def read_slo(text: str) -> Slo:
    """Raises: SettingsError."""
    objectives = parse_objectives(text)
    if set(objectives) - {""}:
        raise SettingsError(f"slo: {text!r} names a class, and simulations have one objective for all")
    return Slo(objectives[""].ttft_s, objectives[""].tbt_s) if objectives else Slo()


def _read_pairs(texts: Sequence[str] | None, flag: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise SettingsError(f"{flag}: {text!r} is not {form}, or {name!r} is there twice")
        found[name] = value
    return found


def _read_roles(texts: Sequence[str] | None) -> Mapping[WorkerRole, int]:
    pairs = _read_pairs(texts, "--roles", "ROLE=N")
    if unknown := sorted(set(pairs) - set(ROLES)):
        raise SettingsError(f"--roles: no role {unknown[0]!r}; there are {', '.join(ROLES)}")
    try:
        roles: dict[WorkerRole, int] = {role: _count(pairs[role]) for role in ROLES if role in pairs}
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"--roles: {error}") from error
    if roles and not roles.get("both") and set(roles) != {"prefill", "decode"}:
        raise SettingsError("--roles: some workers must prefill and some must decode")
    return roles


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _amount(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _share(text: str) -> float:
    value = _factor(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value
