"""A load client for /v1/completions that costs little itself: a raw socket a stream, bytes scanned, nothing parsed."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

_CHOICE = b'"choices":[{'  # no text can hold it: quotes in it are escaped


@dataclass(slots=True)
class Stream:
    """What one streamed request saw; times are `time.perf_counter()` seconds."""

    sent_at: float = 0.0
    chunk_times: list[float] = field(default_factory=list)  # one a `data:` event that carries a choice
    ended_at: float = 0.0
    completion_tokens: int = 0
    status: int = 0
    is_done: bool = False  # saw [DONE]

    @property
    def ttft_s(self) -> float:
        return self.chunk_times[0] - self.sent_at


class _Reader(asyncio.Protocol):
    def __init__(self, request: bytes, stream: Stream) -> None:
        self._request = request
        self._stream = stream
        self._tail = b""
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream.sent_at = time.perf_counter()
        # uvloop's transports are no subclasses of asyncio's.
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        stream = self._stream
        if not stream.status:
            stream.status = int(data[9:12])
        # What is carried over is too short to hold an event that was counted before.
        stream.chunk_times += [now] * (self._tail[1 - len(_CHOICE) :] + data).count(_CHOICE)
        # Usage comes last, in an event of its own, perhaps cut in two.
        self._tail = (self._tail + data)[-2048:]
        if b"[DONE]" in self._tail or stream.status != 200:
            stream.ended_at = now
            stream.is_done = b"[DONE]" in self._tail
            at = self._tail.rfind(b'"completion_tokens":')
            if at >= 0:
                stream.completion_tokens = int(self._tail[at + 20 :].split(b",")[0].split(b"}")[0])
            if not self.finished.done():
                self.finished.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.finished.done():
            self._stream.ended_at = time.perf_counter()
            self.finished.set_result(None)


async def complete(host: str, port: int, body: dict[str, Any]) -> Stream:
    """Stream one completion to its end."""
    payload = json.dumps({"stream": True, "stream_options": {"include_usage": True}, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    stream = Stream()
    transport, reader = await asyncio.get_running_loop().create_connection(
        lambda: _Reader(head.encode() + payload, stream), host, port
    )
    try:
        await reader.finished
    finally:
        transport.close()
    return stream


async def complete_all(host: str, port: int, bodies: list[dict[str, Any]]) -> list[Stream]:
    """Stream all of them at once."""
    return await asyncio.gather(*(complete(host, port, body) for body in bodies))
