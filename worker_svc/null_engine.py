"""An engine without a model: every stream gets tokens at a given pace, so that the mesh itself can be loaded.

Token `i` of a choice is due `null_first_token_s + i / null_tokens_per_s` after its arrival and depends only on the
choice's seed and `i`, so a stream that goes on after a recovery goes on as if nothing had happened. All streams that
are due within one tick leave in one `StepOutput`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from queue import Empty, SimpleQueue
from typing import Final

from weft.errors import InvalidRequest
from weft.hashing import BLOCK_SIZE
from weft.messages import (
    FINISH_ERROR,
    FINISH_NONE,
    Choice,
    ErrorInfo,
    SamplingParams,
    TokenizedRequest,
)
from weft.model_folder import ModelFolder
from weft.settings import WorkerSettings
from worker_svc.engine_io import (
    Add,
    BlocksLoaded,
    BlocksOffloaded,
    Command,
    Drop,
    EngineLoad,
    Started,
    StepOutput,
    TokenRow,
)
from worker_svc.frames import MAX_ROW_TOKENS
from worker_svc.sequence import ending

log = logging.getLogger(__name__)

TICK_S: Final = 0.005
DEFAULT_MAX_TOKENS: Final = 128


@dataclass(slots=True)
class _Stream:
    request_id: str
    gateway: str
    slot: int
    epoch: int
    seed: int
    num_blocks: int
    first_index: int  # where this epoch begins
    next_index: int
    end_index: int
    end_finish: int
    top_logprobs: int | None
    first_due: float  # seconds, monotonic
    ended: bool = False


class NullCore:
    """The streams and when they are due; no thread and no clock."""

    def __init__(self, folder: ModelFolder, settings: WorkerSettings) -> None:
        self.load = EngineLoad()
        self.load.num_blocks = settings.max_num_seqs * ceil(folder.max_model_len / BLOCK_SIZE)
        self.load.num_free_blocks = self.load.num_blocks
        self._max_model_len = folder.max_model_len
        self._tokens_per_s = settings.null_tokens_per_s
        self._first_token_s = settings.null_first_token_s
        self._vocabulary = vocabulary(folder)
        self._requests: dict[str, list[_Stream]] = {}  # those of a request that have not ended
        self._due: dict[int, list[_Stream]] = {}  # by the tick at which their next token is due
        self._ended: list[tuple[str, int]] = []

    @property
    def next_due(self) -> float | None:
        """When `step` has something to do; None while there is no stream."""
        return min(self._due) * TICK_S if self._due else None

    def step(self, commands: Iterable[Command], now: float) -> StepOutput | None:
        """Take in commands and emit every token that is due at `now`."""
        rows: list[TokenRow] = []
        started: list[Started] = []
        for command in commands:
            match command:
                case Add(request, stop_after):
                    self._add(request, stop_after, now, rows, started)
                case Drop():
                    self._drop(command)
                case BlocksLoaded() | BlocksOffloaded():
                    pass
        tick = int(now / TICK_S)
        for key in sorted(key for key in self._due if key <= tick):
            rows += [self._emit(stream, now) for stream in self._due.pop(key) if not stream.ended]
        ended, self._ended = tuple(self._ended), []
        self.load.is_idle = not self._requests
        self.load.decode_tokens_per_s = self._tokens_per_s * self.load.num_running
        if not (rows or started or ended):
            return None
        self.load.num_steps += 1
        self.load.last_step_at = now
        return StepOutput(rows=tuple(rows), started=tuple(started), ended=ended)

    def _add(
        self,
        request: TokenizedRequest,
        stop_after: int | None,
        now: float,
        rows: list[TokenRow],
        started: list[Started],
    ) -> None:
        held = self._requests.get(request.request_id)
        if held is not None:
            if held[0].epoch >= request.epoch:
                return
            self._drop(Drop(request.request_id, held[0].epoch))
        prompt = request.num_prompt_tokens
        started.append(Started(request.request_id, request.gateway, request.epoch, prompt, 0, now))
        self.load.num_prompt_tokens += prompt
        self._requests[request.request_id] = streams = [
            self._stream(request, choice, stop_after, now) for choice in request.choices
        ]
        for stream in list(streams):
            self.load.num_running += 1
            self.load.num_free_blocks -= stream.num_blocks
            if prompt >= self._max_model_len:
                rows.append(self._refuse(stream, prompt))
            elif stream.next_index >= stream.end_index or self._first_token_s == 0:
                rows.append(self._emit(stream, now))
            else:
                self._plan(stream)

    def _stream(self, request: TokenizedRequest, choice: Choice, stop_after: int | None, now: float) -> _Stream:
        index = len(choice.emitted) // 4
        own_end = self._end_index(request.sampling, request.num_prompt_tokens)
        end_index, end_finish = ending(index, stop_after, own_end)
        return _Stream(
            request_id=request.request_id,
            gateway=request.gateway,
            slot=choice.slot,
            epoch=request.epoch,
            seed=choice.seed,
            num_blocks=ceil((request.num_prompt_tokens + max(index, end_index)) / BLOCK_SIZE),
            first_index=index,
            next_index=index,
            end_index=end_index,
            end_finish=end_finish,
            top_logprobs=request.sampling.logprobs,
            first_due=now + self._first_token_s,
        )

    def _end_index(self, sampling: SamplingParams, num_prompt_tokens: int) -> int:
        wanted = DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        return max(0, min(wanted, self._max_model_len - num_prompt_tokens))

    def _emit(self, stream: _Stream, now: float) -> TokenRow:
        """The tokens of `stream` that are due at `now`, at least one unless it has come to its end."""
        first = stream.next_index
        due = stream.first_index + int((now - stream.first_due) * self._tokens_per_s) + 1
        stream.next_index = min(max(due, first + 1), first + MAX_ROW_TOKENS, max(first, stream.end_index))
        token_ids = tuple(self._token(stream.seed, index) for index in range(first, stream.next_index))
        self.load.num_output_tokens += len(token_ids)
        finish = stream.end_finish if stream.next_index >= stream.end_index else FINISH_NONE
        if finish:
            self._end(stream)
        else:
            self._plan(stream)
        k = stream.top_logprobs
        return TokenRow(
            request_id=stream.request_id,
            gateway=stream.gateway,
            slot=stream.slot,
            epoch=stream.epoch,
            first_index=first,
            token_ids=token_ids,
            finish=finish,
            logprobs=() if k is None else tuple((0.0, (token,) * k, (0.0,) * k) for token in token_ids),
        )

    def _refuse(self, stream: _Stream, num_prompt_tokens: int) -> TokenRow:
        self._end(stream)
        error = InvalidRequest(
            f"prompt of {num_prompt_tokens} tokens leaves no room in a context of {self._max_model_len}"
        )
        return TokenRow(
            request_id=stream.request_id,
            gateway=stream.gateway,
            slot=stream.slot,
            epoch=stream.epoch,
            first_index=stream.next_index,
            token_ids=(),
            finish=FINISH_ERROR,
            error=ErrorInfo.of(error),
        )

    def _plan(self, stream: _Stream) -> None:
        due = stream.first_due + (stream.next_index - stream.first_index) / self._tokens_per_s
        self._due.setdefault(ceil(due / TICK_S), []).append(stream)

    def _token(self, seed: int, index: int) -> int:
        return self._vocabulary[(seed + index) % len(self._vocabulary)]

    def _drop(self, drop: Drop) -> None:
        for stream in list(self._requests.get(drop.request_id, ())):
            if stream.epoch <= drop.epoch and (not drop.slots or stream.slot in drop.slots):
                self._end(stream)

    def _end(self, stream: _Stream) -> None:
        stream.ended = True
        self.load.num_running -= 1
        self.load.num_free_blocks += stream.num_blocks
        streams = self._requests[stream.request_id]
        streams.remove(stream)
        if not streams:
            del self._requests[stream.request_id]
            self._ended.append((stream.request_id, stream.epoch))


class NullEngine:
    """A thread around `NullCore`."""

    layout: Final = b""
    block_bytes: Final = 0

    def __init__(self, folder: ModelFolder, settings: WorkerSettings) -> None:
        self._core = NullCore(folder, settings)
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.load = self._core.load
        self.remote_cache_available = False
        self.load_bytes_per_s = 0.0

    def start(self, on_output: Callable[[StepOutput], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(on_output,), name="null-engine", daemon=True)
        self._thread.start()

    def submit(self, command: Command) -> None:
        self._inbox.put(command)

    def stop(self) -> None:
        self._inbox.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, on_output: Callable[[StepOutput], None]) -> None:
        try:
            while (commands := self._receive()) is not None:
                output = self._core.step(commands, time.monotonic())
                if output is not None:
                    on_output(output)
        except Exception as error:
            log.exception("null engine failed")
            self.load.failure = error

    def _receive(self) -> list[Command] | None:
        """Wait for a command or a due token; None ends the thread."""
        due = self._core.next_due
        commands: list[Command] = []
        try:
            timeout = None if due is None else max(0.0, due - time.monotonic())
            command = self._inbox.get(timeout=timeout) if timeout is None or timeout > 0 else self._inbox.get_nowait()
            while command is not None:
                commands.append(command)
                command = self._inbox.get_nowait()
        except Empty:
            return commands
        return None


def vocabulary(folder: ModelFolder) -> list[int]:
    """Token ids that decode to plain text: the middle of a vocabulary, since special ones are at its ends."""
    middle = range(folder.vocab_size // 4, max(folder.vocab_size // 2, folder.vocab_size // 4 + 1))
    return [token_id for token_id in middle if token_id not in folder.eos_token_ids] or [0]
