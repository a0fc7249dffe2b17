"""What a step has to say to the service, gathered as it happens. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from weft.messages import FINISH_ERROR, FINISH_NONE, BlockHash, ErrorInfo, TokenizedRequest
from worker_svc.engine_io import LoadWanted, Progress, Started, StepOutput, TokenRow
from worker_svc.sequence import Request, Sequence
from worker_svc.speculation.speculation import Emitted

if TYPE_CHECKING:
    from worker_svc.sampler import Logprobs

NOTHING: Final = StepOutput()


class Outbox:
    """News of requests and sequences. What became of blocks is added at the end."""

    def __init__(self) -> None:
        self._rows: list[TokenRow] = []
        self._started: list[Started] = []
        self._load: list[LoadWanted] = []
        self._progress: list[Progress] = []
        self._ended: list[tuple[str, int]] = []

    def refused(self, request: TokenizedRequest, error: ErrorInfo) -> None:
        """A request cannot even become sequences: all its choices end."""
        for choice in request.choices:
            self._rows.append(
                TokenRow(
                    request.request_id,
                    request.gateway,
                    choice.slot,
                    request.epoch,
                    len(choice.emitted) // 4,
                    (),
                    FINISH_ERROR,
                    error=error,
                )
            )
        self._ended.append((request.request_id, request.epoch))

    def waits(self, wanted: LoadWanted) -> None:
        """A request waits for blocks that are to be asked for."""
        self._load.append(wanted)

    def started(self, request: Request, num_prompt: int, num_cached: int, at: float) -> None:
        """The first sequence of a request is admitted; `num_cached` tokens of its prompt were found."""
        self._started.append(Started(request.request_id, request.gateway, request.epoch, num_prompt, num_cached, at))

    def progressed(self, sequence: Sequence, kind: Literal["prefill", "preempted"], num_tokens: int) -> None:
        """So many tokens of a sequence are computed, or must be again."""
        request, chunks = sequence.request, sequence.num_chunks
        self._progress.append(Progress(request.request_id, request.gateway, request.epoch, kind, chunks, num_tokens))

    def emitted(self, emitted: Emitted, logprobs: tuple[Logprobs, ...], finish: int = FINISH_NONE) -> None:
        """A sequence got tokens; with `finish`, its last."""
        self._add_row(emitted.sequence, emitted.first_index, tuple(emitted.token_ids), finish, logprobs=logprobs)

    def finished(self, sequence: Sequence, index: int, finish: int, error: ErrorInfo | None = None) -> None:
        """A sequence ended without a token; the next would have been `token_ids[index]`."""
        self._add_row(sequence, index, (), finish, error=error)

    def ended(self, request: Request) -> None:
        """The last sequence of a request has ended."""
        self._ended.append((request.request_id, request.epoch))

    def output(
        self,
        stored: tuple[BlockHash, ...],
        removed: tuple[BlockHash, ...],
        offload: tuple[tuple[BlockHash, bytes], ...],
    ) -> StepOutput | None:
        """All news, with those of blocks; None: there are none."""
        output = StepOutput(
            rows=tuple(self._rows),
            started=tuple(self._started),
            stored=stored,
            removed=removed,
            offload=offload,
            load=tuple(self._load),
            progress=tuple(self._progress),
            ended=tuple(self._ended),
        )
        return None if output == NOTHING else output

    def _add_row(
        self,
        sequence: Sequence,
        index: int,
        token_ids: tuple[int, ...],
        finish: int,
        *,
        logprobs: tuple[Logprobs, ...] = (),
        error: ErrorInfo | None = None,
    ) -> None:
        request, first_index = sequence.request, index - sequence.num_prompt_tokens
        self._rows.append(
            TokenRow(
                request.request_id,
                request.gateway,
                sequence.slot,
                request.epoch,
                first_index,
                token_ids,
                finish,
                logprobs,
                error,
            )
        )
