"""A worker's neighbours in the ring, played by a test: a gateway and a scheduler on real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.columns import pack_u32, unpack_u32
from weft.errors import WeftError
from weft.hashing import block_hashes, chain_root
from weft.messages import (
    HEARTBEAT_INTERVAL_S,
    Assignment,
    Cancel,
    Choice,
    Claims,
    Declined,
    Heartbeat,
    SamplingParams,
    StreamEvent,
    TokenFrame,
    TokenizedRequest,
    WorkerStatus,
)
from weft.service import Context, Service, run
from weft.settings import MeshSettings
from weft.subjects import Returned


def make_request(
    request_id: str = "r1",
    *,
    prompt: Sequence[int] = (5, 6, 7),
    epoch: int = 0,
    gateway: str = "g1",
    model: str = "tales-6m",
    max_tokens: int | None = 3,
    slots: Sequence[int] = (0,),
    model_digest: bytes = b"",
    temperature: float = 0.0,
) -> TokenizedRequest:
    column = pack_u32(prompt)
    return TokenizedRequest(
        request_id=request_id,
        epoch=epoch,
        gateway=gateway,
        model=model,
        prompt_token_ids=column,
        block_hashes=b"".join(block_hashes(chain_root(model_digest), column)),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True),
        choices=[Choice(slot, seed=slot) for slot in slots],
    )


@dataclass
class Neighbours:
    """What the gateway and the scheduler heard, in order."""

    gateway_bus: Bus
    scheduler_bus: Bus
    frames: list[TokenFrame] = field(default_factory=list)
    events: list[StreamEvent] = field(default_factory=list)
    claims: list[Claims] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    statuses: list[WorkerStatus] = field(default_factory=list)
    returned: list[tuple[Returned, WeftError]] = field(default_factory=list)

    def assign(self, worker: str, request: TokenizedRequest) -> None:
        self.scheduler_bus.send(
            subjects.assign(worker),
            Assignment(request, "s1"),
            reply=subjects.returned("scheduler", "s1", request.gateway, request.request_id, request.epoch),
        )

    def cancel(
        self, request_id: str, epoch: int = 0, slots: Sequence[int] = (), num_output_tokens: Sequence[int] = ()
    ) -> None:
        cancel = Cancel(request_id, epoch, "g1", pack_u32(slots), pack_u32(num_output_tokens))
        self.gateway_bus.send(subjects.CANCEL, cancel)

    def beat(self, epoch: int = 1, state: str = "ready") -> None:
        beat = Heartbeat("gateway", "g1", epoch, state)  # type: ignore[arg-type]  # one of State's
        self.gateway_bus.send(subjects.alive("gateway", "g1"), beat)

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """The gateway is there all the time: a worker drops what one holds that nobody hears for three seconds."""
        loop = asyncio.get_running_loop()

        def beat() -> None:
            nonlocal timer
            self.beat()
            timer = loop.call_later(HEARTBEAT_INTERVAL_S, beat)

        timer: asyncio.Handle = loop.call_soon(beat)
        try:
            yield
        finally:
            timer.cancel()

    def tokens(self, slot: int, epoch: int = 0) -> list[int]:
        """What the gateway has of a stream, checked for order."""
        found: list[int] = []
        for frame in self.frames:
            token_ids = unpack_u32(frame.token_ids)
            rows = zip(
                unpack_u32(frame.slots),
                unpack_u32(frame.epochs),
                unpack_u32(frame.first_indices),
                frame.counts,
                strict=True,
            )
            for row_slot, row_epoch, first_index, count in rows:
                own, token_ids = token_ids[:count], token_ids[count:]
                if (row_slot, row_epoch) == (slot, epoch):
                    assert not found or first_index == len(found)
                    found += own
        return found

    def finishes(self) -> dict[int, int]:
        """slot → finish, of the streams that have ended."""
        return {
            slot: finish
            for frame in self.frames
            for slot, finish in zip(unpack_u32(frame.slots), frame.finishes, strict=True)
            if finish
        }

    def kinds(self, request_id: str = "r1") -> list[str]:
        return [event.kind for event in self.events if event.request_id == request_id]

    def _on_gateway(self, message: TokenFrame | StreamEvent | Claims) -> None:
        match message:
            case TokenFrame():
                self.frames.append(message)
            case StreamEvent():
                self.events.append(message)
            case Claims():
                self.claims.append(message)


@asynccontextmanager
async def neighbours(url: str) -> AsyncIterator[Neighbours]:
    """Gateway g1 and scheduler s1. The gateway beats only when told to."""
    mesh = MeshSettings(nats_url=url)
    both = Neighbours(Bus(mesh, "gateway", "g1"), Bus(mesh, "scheduler", "s1"))
    await both.gateway_bus.connect()
    await both.scheduler_bus.connect()
    try:
        await both.gateway_bus.on(subjects.gateway_all("g1"), TokenFrame | StreamEvent | Claims, both._on_gateway)  # type: ignore[arg-type]  # a union of messages
        await both.scheduler_bus.on(subjects.declined("s1"), Declined, both.declined.append)
        await both.scheduler_bus.on(subjects.STATUS_ALL, WorkerStatus, both.statuses.append)
        await both.scheduler_bus.on_returned(lambda hop, error: both.returned.append((hop, error)))
        await both.gateway_bus.flush()
        await both.scheduler_bus.flush()
        yield both
    finally:
        await both.gateway_bus.close()
        await both.scheduler_bus.close()


@asynccontextmanager
async def running(context: Context, service: Service) -> AsyncIterator[asyncio.Task[None]]:
    """Run a service in this process until the block ends."""
    task = asyncio.create_task(run(context, service))
    try:
        await until(lambda: context.state == "ready" or task.done(), timeout_s=30)
        if task.done():
            task.result()
        yield task
    finally:
        context.stop()
        await task
