"""lab.client: what it counts, whatever a server's events look like and however the network cuts them."""

from __future__ import annotations

import asyncio
import random

import pytest

from lab.client import Stream, complete

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"
WEFT = [
    b'data: {"id":"c","choices":[{"index":0,"text":"a \\"choices\\":[{","finish_reason":null}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"text":"b","finish_reason":"length"}]}\n\n',
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n',
]
LLAMA = [
    b'data: {"choices":[{"text":"a","index":0,"finish_reason":null}],"id":"c"}\n\n',
    b'data: {"choices":[{"text":"","index":0,"finish_reason":"length"}],"usage":{"completion_tokens":2},"id":"c"}\n\n',
]


async def streamed(pieces: list[bytes]) -> Stream:
    """The stream of a server that writes these pieces, each by itself."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await complete("127.0.0.1", port, {"prompt": "x"})


@pytest.mark.parametrize("events", [WEFT, LLAMA], ids=["usage in an event of its own", "usage beside the last choice"])
async def test_every_event_with_a_choice_is_counted_once(events: list[bytes]) -> None:
    stream = await streamed([HEAD, *events, DONE])

    assert len(stream.chunk_times) == 2
    assert stream.completion_tokens == 2
    assert stream.is_done and stream.status == 200


@pytest.mark.parametrize("seed", range(5))
async def test_events_cut_anywhere_are_counted_the_same(seed: int) -> None:
    generator = random.Random(seed)
    whole = b"".join([*WEFT, DONE])
    cuts = sorted(generator.sample(range(1, len(whole)), 12))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    stream = await streamed([HEAD, *pieces])

    assert len(stream.chunk_times) == 2, f"seed {seed}"
    assert stream.completion_tokens == 2


async def test_an_error_is_told_by_its_status() -> None:
    stream = await streamed([b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\n\r\n{}"])

    assert stream.status == 429
    assert not stream.is_done and not stream.chunk_times
