"""What goes into an engine and what comes out: plain data between the engine's thread and the service's loop.

An engine runs in a thread of its own. The service submits commands and gets one `StepOutput` a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from weft.messages import BlockHash, ErrorInfo, TokenizedRequest


@dataclass(frozen=True, slots=True)
class Add:
    """Take in a request, all its choices; with `stop_after`, hand each back after so many new tokens."""

    request: TokenizedRequest
    stop_after: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a request up to and with `epoch`; with `slots`, only those of its choices. Frees its blocks at once."""

    request_id: str
    epoch: int
    slots: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BlocksLoaded:
    """The answer to a `LoadWanted`: the blocks that the cache service gave, from the first on; may be none."""

    request_id: str
    epoch: int
    hashes: tuple[BlockHash, ...]
    blocks: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class BlocksOffloaded:
    """So many blocks of `StepOutput.offload` are under way no more, sent or given up: others may follow."""

    num_blocks: int


Command = Add | Drop | BlocksLoaded | BlocksOffloaded


@dataclass(frozen=True, slots=True)
class TokenRow:
    """What one step produced for one stream."""

    request_id: str
    gateway: str
    slot: int
    epoch: int
    first_index: int  # index of token_ids[0] in the completion
    token_ids: tuple[int, ...]
    finish: int = 0  # a FINISH_* of weft.messages
    # For each token: (logprob, top token ids, top logprobs); empty if not asked for.
    logprobs: tuple[tuple[float, tuple[int, ...], tuple[float, ...]], ...] = ()
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A request was planned for the first time in this epoch."""

    request_id: str
    gateway: str
    epoch: int
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt: found in the worker's or the cache service's blocks
    at: float  # seconds, monotonic: it is told of only after the step


@dataclass(frozen=True, slots=True)
class Progress:
    """What a request's client may want to know of its prompt: chunks computed so far, or that all must be again."""

    request_id: str
    gateway: str
    epoch: int
    kind: Literal["prefill", "preempted"]
    num_chunks: int
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class LoadWanted:
    """A request waits for these blocks from the cache service; answer with `BlocksLoaded`, whatever comes of it."""

    request_id: str
    epoch: int
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    rows: tuple[TokenRow, ...] = ()
    started: tuple[Started, ...] = ()
    stored: tuple[BlockHash, ...] = ()  # blocks that entered the prefix cache
    removed: tuple[BlockHash, ...] = ()  # blocks that left it
    # Full blocks worth keeping beyond this worker; answer with `BlocksOffloaded`, whatever comes of it.
    offload: tuple[tuple[BlockHash, bytes], ...] = ()
    load: tuple[LoadWanted, ...] = ()
    progress: tuple[Progress, ...] = ()
    ended: tuple[tuple[str, int], ...] = ()  # (request_id, epoch) all of whose choices have ended or were dropped


# Fields of `EngineLoad` that only grow.
ENGINE_TOTALS: Final = frozenset(
    ("num_steps", "num_preemptions", "num_violations", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
    + ("num_drafted_tokens", "num_accepted_tokens")
)


@dataclass(slots=True)
class EngineLoad:
    """The engine's numbers of this moment; written by its thread, read by anyone."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # free or only cached
    num_steps: int = 0
    num_preemptions: int = 0
    num_violations: int = 0  # of the block pool's books, found while idle: a bug
    num_prompt_tokens: int = 0  # since start, as are the two below
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_drafted_tokens: int = 0  # computed on the chance that they come
    num_accepted_tokens: int = 0  # of these, that came
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    step_s: float = 0.0  # of recent steps that decode
    device_busy_share: float = 0.0  # of the time of recent steps that the device computed
    loaded: float = 0.0  # share of the weights
    warm_up_s: float = 0.0  # of the start, after the weights were there
    last_step_at: float = 0.0  # monotonic seconds
    is_idle: bool = True
    failure: Exception | None = None  # what ended the engine's thread; the process should end too
    cached_hashes: Callable[[], list[BlockHash]] = field(default=list)

    def on_progress(self, share: float) -> None:
        """So much of the weights is loaded. Mutates self."""
        self.loaded = share


class EngineThread(Protocol):
    """An engine as the service sees it; `TorchEngine` and `NullEngine` are two."""

    load: EngineLoad
    # Set by the service: whether a cache service is there, and how fast blocks came from it (0 = not yet measured).
    remote_cache_available: bool
    load_bytes_per_s: float

    @property
    def layout(self) -> bytes:
        """What the bytes of a block mean: part of the cache service's keys. Known after `start`."""

    @property
    def block_bytes(self) -> int:
        """Size of a block as it is offloaded; 0 for an engine that has none. Known after `start`."""

    def start(self, on_output: Callable[[StepOutput], None]) -> None:
        """Load, warm up and start the thread; returns when it is ready to step. `on_output` runs in that thread.

        Raises:
            SettingsError: the model folder cannot be served.
        """

    def submit(self, command: Command) -> None:
        """Hand over a command; it takes effect before the next step. Any thread."""

    def stop(self) -> None:
        """End the thread after the step it is in."""
