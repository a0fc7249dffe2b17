"""What the scheduler's tests are made of: requests, statuses and states with few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler_svc.policy.admit import AdmitPolicy, Open
from scheduler_svc.policy.order import Fcfs
from scheduler_svc.policy.route import LeastLoaded, RoutePolicy
from scheduler_svc.state import ClusterState
from weft.columns import pack_u32
from weft.messages import Choice, KvEvents, SamplingParams, TokenizedRequest, WorkerStatus

SCHEDULER = "s0"
MODEL = "tales"
NUM_BLOCK_TOKENS = 16


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


def make_request(
    request_id: str = "r0",
    *,
    epoch: int = 0,
    num_choices: int = 1,
    blocks: Sequence[int] = (),
    num_tokens: int = 0,
    gateway: str = "g0",
    model: str = MODEL,
    max_tokens: int | None = None,
) -> TokenizedRequest:
    """A prompt of `num_tokens`, or of the given blocks."""
    return TokenizedRequest(
        request_id=request_id,
        epoch=epoch,
        gateway=gateway,
        model=model,
        prompt_token_ids=pack_u32([7] * (num_tokens or NUM_BLOCK_TOKENS * len(blocks) or 1)),
        block_hashes=b"".join(map(block, blocks)),
        sampling=SamplingParams(max_tokens=max_tokens),
        choices=[Choice(slot, 1) for slot in range(num_choices)],
    )


def make_status(worker: str = "w0", **changes: Any) -> WorkerStatus:
    """A ready worker with room for 4."""
    values: dict[str, Any] = {
        "worker": worker,
        "worker_epoch": 1,
        "model": MODEL,
        "state": "ready",
        "max_num_seqs": 4,
        "num_running": 0,
        "num_waiting": 0,
        "num_waiting_tokens": 0,
        "num_blocks": 100,
        "num_free_blocks": 100,
        "accepted": {},
        "kv_sequence": 0,
    }
    return WorkerStatus(**(values | changes))


def make_events(
    sequence: int,
    stored: Sequence[int] = (),
    removed: Sequence[int] = (),
    *,
    holder: str = "w0",
    epoch: int = 1,
    snapshot: bool = False,
) -> KvEvents:
    return KvEvents(holder, epoch, sequence, b"".join(map(block, stored)), b"".join(map(block, removed)), snapshot)


def make_state(*, admit: AdmitPolicy | None = None, route: RoutePolicy | None = None) -> ClusterState:
    return ClusterState(SCHEDULER, admit=admit or Open(), order=Fcfs, route=route or LeastLoaded())
