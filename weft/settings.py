"""Settings: what each role can be told, by flags or `WEFT_*` environment variables, read once at start.

A setting is a dataclass field made by `setting`. A flag wins over the environment, and both win over a preset. An
unknown `WEFT_*` variable, a bad value or an unknown flag raises `SettingsError`, which names it; `weft.service.main`
exits with status 2 then.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from weft import limits
from weft.errors import SettingsError
from weft.presets import PRESETS, WEFT

T = TypeVar("T")
PREFIX = "WEFT_"
# Where the parser keeps arguments that are no flags.
_WORDS = "words"
# Headings in `--help`, where the attribute's name does not say it.
_GROUPS = {"mesh": "joining the mesh"}
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def setting(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    choices: Sequence[str] = (),
    size: bool = False,
    share: bool = False,
    secret: bool = False,
) -> Any:
    """Declare one setting.

    Args:
        help: one sentence: who changes it and why.
        ge, le: bounds of a number.
        choices: the only values of a string.
        size: a number of bytes, which may be written with a unit ("256MiB").
        share: a `size`, or a share of what there is ("60%"): a float then.
        secret: read from the environment only, since argument lists are visible to other processes.
    """
    metadata = {
        "help": help,
        "ge": ge,
        "le": le,
        "choices": tuple(choices),
        "size": size or share,
        "share": share,
        "secret": secret,
    }
    return field(default=default, metadata=metadata)


def _preset() -> Any:
    """The setting of every service that presets set something of."""
    return setting(
        "weft",
        "Decide as another system does: defaults of the policies and of workers, which other settings win over.",
        choices=tuple(PRESETS),
    )


def _tenants_file() -> Any:
    return setting(
        "",
        "File with a line a tenant, as `acme weight=2 tokens_per_minute=60000`: share, quota, class and priority; "
        "without one, nobody is bounded.",
    )


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """What every service needs to join the mesh."""

    nats_url: str = setting(
        "nats://127.0.0.1:4222",
        "Where NATS listens, on another machine or port say; a comma-separated list for a cluster.",
    )
    nats_user: str = setting("", "NATS user of this role, where the server has accounts.")
    nats_password: str = setting("", "Password of that user.", secret=True)
    instance: str = setting("", "Name of this instance on the bus, to tell it by in logs; made up if empty.")
    startup_s: float = setting(
        30.0, "Seconds to wait for NATS at start before giving up; more where NATS starts later.", ge=0.1
    )
    drain_s: float = setting(
        30.0,
        "Seconds that running requests may go on after SIGTERM; less than what the platform waits before it kills.",
        ge=0,
    )
    metrics_port: int = setting(
        0, "Port of /metrics, /live and /ready of this process, for Prometheus and probes; 0 for none.", ge=0, le=65535
    )
    metrics_host: str = setting(
        "127.0.0.1", "Address that /metrics, /live and /ready listen on; 0.0.0.0 to scrape from other machines."
    )
    log_level: str = setting(
        "info",
        "Least level that is logged; debug to follow single requests.",
        choices=("debug", "info", "warning", "error"),
    )


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, for the services that read its folder."""

    model: str = setting("tales-6m", "Model folder, Hugging Face name, or the name of a bundled model.")
    served_name: str = setting("", "Name that clients use; the folder's or repository's last part if empty.")
    max_model_len: int = setting(
        0, "Longest prompt plus completion, in tokens, to bound what one request may take; 0 for the model's own.", ge=0
    )
    load_format: str = setting(
        "auto",
        "`dummy` makes up weights for a folder that needs no more than a config.json, to measure a model by its shape.",
        choices=("auto", "dummy"),
    )


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Serve the OpenAI API over HTTP, and own every stream."""

    mesh: MeshSettings
    host: str = setting("127.0.0.1", "Address that the HTTP server listens on; 0.0.0.0 to serve other machines.")
    port: int = setting(8000, "Port that the HTTP server listens on; 0 for any free one.", ge=0, le=65535)
    listen_fds: str = setting(
        "",
        "Sockets to listen on instead, by their file descriptors (3,4), from whoever opened the port and keeps it: "
        "systemd, or `weft up`, which sets this itself.",
    )
    api_keys_file: str = setting("", "File with `tenant:sha256-of-key` lines; without one, no key is asked for.")
    tenants_file: str = _tenants_file()
    max_inflight: int = setting(
        4096, "Requests held at once, to bound the gateway's memory; more are answered 429.", ge=1
    )
    explained_requests: int = setting(
        1000,
        "Requests that ended whose time lines can be asked for, 8 MiB of them at most; more to look further back.",
        ge=0,
    )
    max_body_size: int = setting(
        limits.MAX_BODY_BYTES,
        "Largest request body, to bound what one call may cost.",
        size=True,
        ge=1024,
        le=limits.MAX_BODY_BYTES,
    )
    slow_reader_size: int = setting(
        2**20,
        "Unread bytes of one stream at which its client is cut off, to bound what slow readers cost.",
        size=True,
        ge=4096,
    )
    wait_for_role_s: float = setting(
        30.0,
        "Seconds that a request waits for a missing role before it gets a 503; longer than a worker takes to start.",
        ge=0,
    )
    stall_s: float = setting(
        120.0,
        "Seconds without a new token after which a recovered stream fails; longer than the longest prefill takes.",
        ge=1,
    )


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Turn the prompts of one model into token ids."""

    mesh: MeshSettings
    model: ModelSettings
    template_deadline_s: float = setting(
        1.0, "Seconds that rendering a chat template may take; more for templates known to be slow.", ge=0.01
    )
    tokenizer_threads: int = setting(1, "Threads for long prompts; more where many of them come at once.", ge=1, le=64)


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Decide whether, when and where requests run."""

    mesh: MeshSettings
    preset: str = _preset()
    admit: str = setting(
        WEFT.admit,
        "Whether a request is taken; early_reject and predicted_reject keep the objectives of SLO classes.",
        choices=("open", "bounded", "early_reject", "predicted_reject"),
    )
    order: str = setting(
        WEFT.order,
        "Which waiting request goes next; srpt for the least mean time, fair for tenants that share.",
        choices=("fcfs", "priority", "sjf", "srpt", "mlfq", "edf", "fair", "prefix_first"),
    )
    route: str = setting(
        WEFT.route,
        "Which worker gets a request; least_prefill or min_ttft for the soonest first token.",
        choices=(
            "random",
            "round_robin",
            "least_loaded",
            "power_of_two",
            "prefix_aware",
            "least_prefill",
            "min_ttft",
            "pd_heatmap",
            "preble_e2",
        ),
    )
    predict: str = setting(
        WEFT.predict,
        "How lengths of answers are guessed; bucket learns them by tenant and length of the prompt.",
        choices=("none", "mean", "bucket"),
    )
    slo: str = setting(
        WEFT.slo,
        "What SLO classes are promised, in seconds, as `ttft=2,tbt=0.2; priority:ttft=0.5,tbt=0.1`, for early_reject, "
        "predicted_reject, edf and `--scale slo`.",
    )
    tenants_file: str = _tenants_file()
    cost_file: str = setting(
        "",
        "File that `weft calibrate --out` wrote on a worker's machine: what work costs, for early_reject, "
        "predicted_reject, min_ttft and preble_e2; without one, from what workers measure lately.",
    )
    max_queued_requests: int = setting(
        2048,
        "Requests of a model that may wait before new ones get 429; fewer to refuse early, more to ride out bursts.",
        ge=1,
    )
    max_queued_tokens: int = setting(
        4_000_000, "Tokens of a model that may wait for prefill before new requests get 429.", ge=1
    )
    scale: str = setting(
        "none",
        "How many workers a model gets: as many as its load asks for, by queue, by the strictest TTFT of `--slo` or by "
        "forecast.",
        choices=("none", "fixed", "queue", "slo", "predictive"),
    )
    min_workers: int = setting(
        0, "Workers of a model that scaling keeps at least; 0 to have none while nothing is asked.", ge=0, le=256
    )
    max_workers: int = setting(
        1, "Workers of a model that scaling starts at most; as many as the machine has room for.", ge=1, le=256
    )
    scale_idle_s: float = setting(
        300.0, "Seconds without a request after which a model has no workers, where the minimum is 0.", ge=0
    )


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Run one replica of a model."""

    mesh: MeshSettings
    model: ModelSettings
    engine: str = setting(
        "torch",
        "`null` emits tokens at a given pace without a model, to load the mesh itself.",
        choices=("torch", "null"),
    )
    preset: str = _preset()
    role: str = setting(
        "auto",
        "What a worker is for: prefill and decode workers share the work of a request, where the route is min_ttft or "
        "pd_heatmap; auto is as the preset divides the workers of `weft up`, and both elsewhere.",
        choices=("auto", "both", "prefill", "decode"),
    )
    device: str = setting(
        "auto", "Where the model runs; auto is a GPU if there is one.", choices=("auto", "cpu", "cuda")
    )
    dtype: str = setting(
        "auto",
        "Type of weights and KV; auto is float32 on a CPU, elsewhere the model's; int8 is auto and --quantize int8.",
        choices=("auto", "float32", "bfloat16", "float16", "int8"),
    )
    quantize: str = setting(
        "none",
        "Load the float weights of linears in few bits: a smaller and faster model that is a little worse.",
        choices=("none", "int8", "int4", "fp8"),
    )
    kernels: str = setting(
        "auto",
        "What computes: kernels in Triton on a GPU, in numba on a CPU, or plain torch, to compare with.",
        choices=("auto", "torch", "numba", "triton"),
    )
    threads: int = setting(
        0,
        "CPU threads of the model for large steps, small ones take fewer; 0 for all cores but one in eight.",
        ge=0,
        le=1024,
    )
    tensor_parallel: int = setting(
        1,
        "Devices that compute one model together, a process each: more where it does not fit into one, or for a "
        "faster step.",
        ge=1,
        le=64,
    )
    kv_memory: int | float = setting(
        0,
        "Memory for KV blocks, or the share of it that is free after the weights (60%): more holds more and longer "
        "requests, and more prefixes; 0 for 90% of a GPU's, on a CPU for 512MiB or one longest request.",
        share=True,
        ge=0,
    )
    max_num_seqs: int = setting(
        WEFT.max_num_seqs,
        "Sequences that run at once: more for throughput, fewer for each stream's pace.",
        ge=1,
        le=65536,
    )
    max_num_batched_tokens: int = setting(
        WEFT.max_num_batched_tokens,
        "Tokens that one step computes at most: fewer keep streams smooth while long prompts are read.",
        ge=1,
    )
    batching: str = setting(
        WEFT.batching,
        "Who computes in a step: prompts in chunks beside running streams, whole, or before them; static to compare.",
        choices=("chunked", "continuous", "prefill_first", "static"),
    )
    reserve: str = setting(
        WEFT.reserve,
        "KV blocks that a sequence gets at its start: as tokens come, or to the end; all but paged are to compare.",
        choices=("paged", "reserve_max", "reserve_pow2", "reserve_oracle"),
    )
    speculation: str = setting(
        "none",
        "Guess tokens and check them in one step, where that is measured to pay: from the text itself (ngram), or by a "
        "smaller model (draft). The text stays the same.",
        choices=("none", "ngram", "draft"),
    )
    speculation_tokens: int = setting(
        8, "Tokens guessed at most for a step of a sequence; how many are worth it is measured.", ge=1, le=64
    )
    draft_model: str = setting(
        "", "Folder of the smaller model that guesses, with the same tokenizer; for `tales-6m` `tales-1m` if empty."
    )
    prefix_cache: bool = setting(
        WEFT.prefix_cache, "Keep and reuse the KV blocks of finished requests; false to measure without."
    )
    kv_offload: str = setting(
        WEFT.kv_offload,
        "When full blocks are sent to the cache service: at once (always), while nothing runs (idle), or never, where "
        "no prompts come back; auto is always on a GPU or where prompts are prefilled for others, idle on other CPUs.",
        choices=("auto", "always", "idle", "never"),
    )
    kv_load: str = setting(
        WEFT.kv_load,
        "Load blocks from the cache service: when that looks faster than computing them, always, or never.",
        choices=("auto", "always", "never"),
    )
    engine_stall_s: float = setting(
        20.0, "Seconds without a step after which a worker counts as dead; longer than a step can take.", ge=0.1
    )
    step_log: str = setting(
        "",
        "Folder for a file of what each step computed and how long it took, for `weft calibrate --steps`.",
    )
    null_tokens_per_s: float = setting(30.0, "Tokens a second of each stream of the null engine.", ge=0.001)
    null_first_token_s: float = setting(0.0, "Seconds to the first token of the null engine.", ge=0)


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Keep KV blocks beyond any worker's memory and life: one shard of the cache."""

    mesh: MeshSettings
    memory_size: int = setting(256 * 2**20, "Memory for blocks; as much as the machine can spare.", size=True, ge=0)
    disk_size: int = setting(2**30, "Disk space for blocks; as much as the disk can spare.", size=True, ge=0)
    disk_path: str = setting(
        "", "Folder for blocks on disk, on a fast one; if empty none, or with `weft up` the data folder."
    )


@dataclass(frozen=True, slots=True)
class UpSettings:
    """Start Weft on this machine: a NATS server, the five services and N workers, restarted when they die.

    Every setting of every service is one of `weft up` as well, and reaches the services that have it.
    """

    gateway: GatewaySettings
    tokenizer: TokenizerSettings
    scheduler: SchedulerSettings
    worker: WorkerSettings
    cache: CacheSettings
    workers: int = setting(1, "Worker processes; one for each GPU, or a few to share the cores.", ge=0, le=256)
    prewarm: int = setting(
        0, "Processes that `--scale` keeps ready to become workers; as many as a burst needs at once.", ge=0, le=64
    )
    fork: bool = setting(
        False,
        "Fork workers from a process that has loaded the model: they start in no time and hold the weights once, all "
        "together. On CPUs, under Linux.",
    )
    data_path: str = setting("", "Folder for logs, run-time files and the cache's disk tier; ~/.cache/weft if empty.")
    verbose: bool = setting(False, "Show the log lines of all processes, which go to files in any case.")
    nats_url: str = setting("", "NATS server or cluster to join; empty to start one of its own.")
    metrics_port: int = setting(
        0, "First of a row of ports, one for each process, of /metrics, /live and /ready; 0 for none.", ge=0, le=65535
    )


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Talk to a running mesh in the terminal; what is not given is as the model's makers advise."""

    url: str = setting("", "Address of the gateway; that of the `weft up` that runs here if empty.")
    api_key: str = setting("", "API key, for a gateway that asks for one.", secret=True)
    model: str = setting("", "Model to talk to; the first that the gateway serves if empty.")
    system: str = setting("", "System message that begins every conversation.")
    temperature: float | None = setting(None, "0 for the likeliest words, more for surprises.", ge=0, le=100)
    max_tokens: int | None = setting(None, "Longest answer, in tokens.", ge=1)
    data_path: str = setting("", "Data folder of the `weft up` to talk to; ~/.cache/weft if empty.")


@dataclass(frozen=True, slots=True)
class ExplainSettings:
    """Show the time line of a request by the id of its answer, and why it was placed where it was."""

    url: str = setting("", "Address of the gateway; that of the `weft up` that runs here if empty.")
    api_key: str = setting("", "The API key that made the request, for a gateway that asks for one.", secret=True)
    data_path: str = setting("", "Data folder of the `weft up` that served it; ~/.cache/weft if empty.")


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """How an operator's commands reach a mesh: on its bus."""

    nats_url: str = setting("", "NATS server of the mesh; that of the `weft up` that runs here if empty.")
    nats_user: str = setting("", "NATS user with an operator's rights; empty for a server without accounts.")
    nats_password: str = setting("", "Password of that user.", secret=True)
    data_path: str = setting("", "Data folder of the `weft up` to look at; ~/.cache/weft if empty.")


@dataclass(frozen=True, slots=True)
class TopSettings:
    """Show every instance of a mesh and its load, and go on showing it on a terminal."""

    operator: OperatorSettings
    once: bool = setting(False, "Show one table and end, as is done without a terminal.")


@dataclass(frozen=True, slots=True)
class DrainSettings:
    """Let one instance finish its work and end, and wait until it has; `weft top` lists instances."""

    operator: OperatorSettings


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Switch policies of the schedulers while they run; without FAMILY=NAME, say what they are.

    Families are admit, order, route and predict, and scale where `--scale` is on; `weft up --help` lists their names.
    """

    operator: OperatorSettings
    model: str = setting("", "Model whose policies are meant; all models if empty.")


@dataclass(frozen=True, slots=True)
class ComposeScaleSettings:
    """Start and end the worker containers of a docker compose project as its schedulers advise."""

    service: str = setting("worker", "Service of the compose file whose containers are workers; another for GPUs.")
    scaled_model: str = setting("", "Model whose workers they are, where a mesh has several; any if empty.")


@dataclass(frozen=True, slots=True)
class AdviceSettings:
    """Write down what the schedulers advise, a line of JSON each, until the input ends."""

    mesh: MeshSettings


# Every settings class: a `WEFT_*` variable that none of them knows is a mistake.
ALL_SETTINGS: tuple[type, ...] = (
    GatewaySettings,
    TokenizerSettings,
    SchedulerSettings,
    WorkerSettings,
    CacheSettings,
    UpSettings,
    ChatSettings,
    ExplainSettings,
    TopSettings,
    DrainSettings,
    PolicySettings,
    ComposeScaleSettings,
    AdviceSettings,
)


@dataclass(frozen=True, slots=True)
class Declared:
    """One setting as declared: `path` are the attribute names that lead to it."""

    path: tuple[str, ...]
    type: type
    default: Any
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def declared(cls: type) -> list[Declared]:
    """All settings of a settings class, those of nested classes first."""
    found: list[Declared] = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found += [dataclasses.replace(inner, path=(item.name, *inner.path)) for inner in declared(kind)]
        else:
            # `float | None`: a number that may be left out.
            plain = next(arg for arg in (*typing.get_args(kind), kind) if arg is not type(None))
            found.append(Declared((item.name,), plain, item.default, item.metadata))
    return found


def load(
    cls: type[T],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str = "weft",
    command: argparse.ArgumentParser | None = None,
) -> T:
    """Read `cls` from flags and environment.

    Args:
        command: flags of a command's own, which it has taken out of `argv`; `--help` shows them, and its description
            instead of that of `cls`.

    Raises:
        SettingsError: names the flag or variable and what is wrong with it.
        SystemExit: after printing, for `--help`.
    """
    return _load(cls, argv, environ, _parser(cls, declared(cls), prog, command))[0]


def load_with_words(cls: type[T], argv: Sequence[str], environ: Mapping[str, str], *, prog: str) -> tuple[T, list[str]]:
    """As `load`, for a command with arguments that are no flags. Returns: the settings, and these words in their order.

    Raises: as `load`.
    """
    parser = _parser(cls, declared(cls), prog, None)
    parser.add_argument(_WORDS, nargs="*", help=argparse.SUPPRESS)
    return _load(cls, argv, environ, parser)


def _load(
    cls: type[T], argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser
) -> tuple[T, list[str]]:
    settings = declared(cls)
    _check_variables(environ)
    # Words and flags in any order.
    flags = vars(parser.parse_intermixed_args(list(argv)))
    words: list[str] = flags.pop(_WORDS, [])
    given = {item.path: value for item in settings if (value := _given(item, flags, environ)) is not None}
    presets = {value for path, value in given.items() if path[-1] == "preset"}
    preset = PRESETS[presets.pop()].settings if presets else {}
    values = {item.path: given.get(item.path, preset.get(item.name, item.default)) for item in settings}
    return _build(cls, (), values), words


def _given(item: Declared, flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Any:
    """What the user says of a setting; None if that is nothing."""
    flag = flags.get(item.name)
    if flag is not None:
        return parse(item, flag, item.flag)
    return parse(item, environ[item.variable], item.variable) if item.variable in environ else None


def parse(item: Declared, text: str, source: str) -> Any:
    """Turn text into the setting's value. Raises SettingsError, which names `source`."""
    meta = item.metadata
    try:
        if meta["size"]:
            value = parse_share(text) if meta["share"] else parse_size(text)
        else:
            value = _parse_plain(item.type, text)
    except ValueError as error:
        raise SettingsError(f"{source}: {error}") from error
    if meta["choices"] and value not in meta["choices"]:
        raise SettingsError(f"{source}: {text!r} is none of {', '.join(meta['choices'])}")
    if meta["ge"] is not None and not value >= meta["ge"]:
        raise SettingsError(f"{source}: {text} is less than {meta['ge']}")
    if meta["le"] is not None and not value <= meta["le"]:
        raise SettingsError(f"{source}: {text} is more than {meta['le']}")
    return value


def parse_size(text: str) -> int:
    """`"256MiB"` or `"1000"` to bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size such as 256MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_share(text: str) -> int | float:
    """`"60%"` or `"0.6"` to 0.6, anything else as a size. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*|\s*(0\.[0-9]+|1\.0)\s*", text)
    if not match:
        return parse_size(text)
    share = float(match[1]) / 100 if match[1] else float(match[2])
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is no share between 0% and 100%")
    return share


def to_environ(settings: Any) -> dict[str, str]:
    """The environment variables from which `load` reads these very settings, for a child process."""
    values = {item.variable: functools.reduce(getattr, item.path, settings) for item in declared(type(settings))}
    return {variable: str(value) for variable, value in values.items() if value is not None}


def _parse_plain(kind: type, text: str) -> Any:
    if kind is bool:
        lowered = text.lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"{text!r} is neither true nor false")
    if kind is str:
        return text
    noun = {int: "whole number", float: "number"}[kind]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is no {noun}") from None


def _check_variables(environ: Mapping[str, str]) -> None:
    known = {item.variable for cls in ALL_SETTINGS for item in declared(cls)}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"{variable}: no such setting{hint}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see `{self.prog} --help`)")


def _parser(
    cls: type, settings: Sequence[Declared], prog: str, command: argparse.ArgumentParser | None
) -> argparse.ArgumentParser:
    doc = (cls.__doc__ or "").strip() if not (cls.__doc__ or "").startswith(cls.__name__ + "(") else ""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [OPTIONS]",
        description=doc if command is None else command.description,
        formatter_class=argparse.HelpFormatter if command is None else command.formatter_class,
        parents=() if command is None else (command,),
        allow_abbrev=False,
        epilog="Every flag can be given as an environment variable: WEFT_ and its name in capitals.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    seen: set[str] = set()
    # The class's own settings first: they win over those of the same name in classes nested in it.
    for item in sorted(settings, key=lambda item: len(item.path)):
        if item.metadata["secret"] or item.name in seen:
            continue
        seen.add(item.name)
        title = _GROUPS.get(item.path[-2], item.path[-2]) if len(item.path) > 1 else "settings"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        given = item.default not in ("", None)
        shown = item.metadata["help"] + (f" (default: {_show(item)})" if given else "")
        groups[title].add_argument(
            item.flag,
            dest=item.name,
            metavar=_metavar(item),
            help=shown.replace("%", "%%"),
            # `--verbose` says as much as `--verbose true`.
            nargs="?" if item.type is bool else None,
            const="true" if item.type is bool else None,
        )
    return parser


def _show(item: Declared) -> str:
    """A default as a user would write it."""
    if item.type is bool:
        return str(item.default).lower()
    if item.metadata["size"]:
        for unit, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if item.default and item.default % unit == 0:
                return f"{item.default // unit}{suffix}"
    return f"{item.default:g}" if item.type is float else str(item.default)


def _metavar(item: Declared) -> str:
    if item.metadata["choices"]:
        return "|".join(item.metadata["choices"])
    return "SIZE" if item.metadata["size"] else {bool: "true|false", int: "N", float: "X"}.get(item.type, "TEXT")


def _build(cls: type[T], path: tuple[str, ...], values: Mapping[tuple[str, ...], Any]) -> T:
    hints = typing.get_type_hints(cls)
    arguments = {
        item.name: _build(hints[item.name], (*path, item.name), values)
        if dataclasses.is_dataclass(hints[item.name])
        else values[(*path, item.name)]
        for item in dataclasses.fields(cls)  # type: ignore[arg-type]  # settings classes are dataclasses
    }
    return cls(**arguments)
