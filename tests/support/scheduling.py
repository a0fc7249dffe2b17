"""What the scheduler's tests are made of: requests, statuses and states with few words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from scheduler_svc.policies import PolicyMaker, PolicyNames
from scheduler_svc.policy.order import Waiting
from scheduler_svc.state import ClusterState
from scheduler_svc.workers import InFlight, Worker
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
    **changes: Any,
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
        **changes,
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


def make_worker(
    bit: int, load: int = 0, *, last_used: int = 0, max_num_seqs: int = 64, waiting_tokens: int = 0, **status: Any
) -> Worker:
    """A worker as the pool has it."""
    name = f"w{bit}"
    status |= {"num_running": load, "max_num_seqs": max_num_seqs, "num_waiting_tokens": waiting_tokens}
    worker = Worker(name, bit, make_status(name, **status), 0.0, last_used=last_used)
    worker.refresh(1)
    return worker


def make_waiting(request: TokenizedRequest, ticket: int = 0, since: float = 0.0, **known: Any) -> Waiting:
    return Waiting(request, ticket, since, **known)


def make_flight(request: TokenizedRequest, ticket: int = 0, sent_at: float = 0.0) -> InFlight:
    return InFlight(make_waiting(request, ticket), sent_at)


def make_maker(max_queued_requests: int = 2048, max_queued_tokens: int = 4_000_000, **changes: Any) -> PolicyMaker:
    return PolicyMaker(random.Random(1), max_queued_requests, max_queued_tokens, **changes)


def make_state(maker: PolicyMaker | None = None, **names: str) -> ClusterState:
    """A scheduler that takes everything and sends it to the least loaded worker, unless other policies are named."""
    return ClusterState(
        SCHEDULER, maker or make_maker(), PolicyNames(**{"admit": "open", "route": "least_loaded"} | names)
    )
