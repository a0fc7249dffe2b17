"""What a worker says about itself and what it holds, as numbered messages. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from weft.columns import pack_u32
from weft.messages import (
    BlockHash,
    Ended,
    ErrorInfo,
    KvEvents,
    State,
    StreamEvent,
    TokenFrame,
    TokenizedRequest,
    WorkerRole,
    WorkerStatus,
)
from weft.model_folder import ModelFolder
from weft.subjects import Returned
from worker_svc.engine_io import EngineLoad, Progress, Started, TokenRow
from worker_svc.frames import to_frames
from worker_svc.held import HeldRequest

# Schedulers that have gone are kept in the books until there are this many.
MAX_SCHEDULERS: Final = 1000


class Reports:
    """Makes the messages, and keeps the numbers that each kind of them is counted by."""

    def __init__(self, worker: str, worker_epoch: int, role: WorkerRole = "both") -> None:
        self._worker = worker
        self._role = role
        self._worker_epoch = worker_epoch
        self._frame_sequence: dict[str, int] = {}  # of each gateway's next frame
        self._kv_sequence = 0  # of the last KvEvents
        self._accepted: dict[str, int] = {}  # sequences ever taken, by scheduler

    def accept(self, scheduler: str, num_choices: int, schedulers: Iterable[str]) -> None:
        """Count an assignment that is under way no more; `schedulers` are those known to live."""
        self._accepted[scheduler] = self._accepted.get(scheduler, 0) + num_choices
        if len(self._accepted) > MAX_SCHEDULERS:
            living = {scheduler, *schedulers}
            self._accepted = {name: count for name, count in self._accepted.items() if name in living}

    def frames(self, rows: Sequence[TokenRow]) -> list[tuple[str, TokenFrame]]:
        """(gateway, frame) pairs."""
        return to_frames(rows, self._frame_sequence, worker=self._worker, worker_epoch=self._worker_epoch)

    def ended(self, model: str, ends: Sequence[tuple[HeldRequest, int]]) -> Ended:
        """`ends`: choices that have come to their end, and how many tokens they have generated, in all epochs."""
        return Ended(
            self._worker,
            model,
            request_ids=[held.request_id for held, _ in ends],
            tenants=[held.tenant for held, _ in ends],
            num_prompt_tokens=pack_u32([held.num_prompt_tokens for held, _ in ends]),
            num_output_tokens=pack_u32([count for _, count in ends]),
        )

    def kv_events(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> KvEvents:
        self._kv_sequence += 1
        return KvEvents(self._worker, self._worker_epoch, self._kv_sequence, b"".join(stored), b"".join(removed))

    def kv_snapshot(self, hashes: Sequence[BlockHash]) -> KvEvents:
        """All blocks held, under the number of the last KvEvents: the next one follows it."""
        return KvEvents(self._worker, self._worker_epoch, self._kv_sequence, b"".join(hashes), snapshot=True)

    def status(
        self,
        folder: ModelFolder,
        state: State,
        load: EngineLoad,
        num_sequences: int,
        max_num_seqs: int,
        block_load_s: float = 0.0,
    ) -> WorkerStatus:
        num_running = min(load.num_running, num_sequences)
        return WorkerStatus(
            worker=self._worker,
            worker_epoch=self._worker_epoch,
            model=folder.name,
            state=state,
            max_num_seqs=max_num_seqs,
            num_running=num_running,
            # All that is held counts, what the engine has not seen yet included.
            num_waiting=num_sequences - num_running,
            num_waiting_tokens=load.num_waiting_tokens,
            num_blocks=load.num_blocks,
            num_free_blocks=load.num_free_blocks,
            accepted=self._accepted,
            kv_sequence=self._kv_sequence,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_tokens_per_s=load.decode_tokens_per_s,
            role=self._role,
            step_s=load.step_s,
            block_load_s=block_load_s,
        )

    def started(self, started: Started, stamps: Mapping[str, float]) -> StreamEvent:
        return StreamEvent(
            started.request_id,
            started.epoch,
            "started",
            "worker",
            self._worker,
            num_prompt_tokens=started.num_prompt_tokens,
            num_cached_tokens=started.num_cached_tokens,
            stamps=dict(stamps),
        )

    def progress(self, progress: Progress) -> StreamEvent:
        return StreamEvent(
            progress.request_id,
            progress.epoch,
            progress.kind,
            "worker",
            self._worker,
            num_chunks=progress.num_chunks,
            num_computed_tokens=progress.num_computed_tokens,
        )

    def event(
        self, about: HeldRequest | TokenizedRequest | Returned, kind: Literal["rejected", "lost"], error: ErrorInfo
    ) -> StreamEvent:
        return StreamEvent(about.request_id, about.epoch, kind, "worker", self._worker, error)
