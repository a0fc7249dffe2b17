"""kill -9 of any process in the middle of a stream: the client's text is the one it would have had, each token once.

A real mesh of the bundled model with two workers; greedy text, so that there is one right answer.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from tests.support import up
from tests.support.processes import children_of
from tests.support.up import Up
from tests.support.wait import until

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]
MODEL = "tales-6m"
NUM_TOKENS = 300
REQUEST = "Tell me a tale about a fox"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up.running(tmp_path_factory.mktemp("chaos"), "--workers", "2", "--kv-memory", "64MiB") as running:
        yield running


@asynccontextmanager
async def client(mesh: Up) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


async def stream(openai: AsyncOpenAI, **more: object) -> AsyncStream[ChatCompletionChunk]:
    return await openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": REQUEST}],
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        **more,  # type: ignore[call-overload]
    )


async def read(answer: AsyncStream[ChatCompletionChunk], at: int = -1, then: object = None) -> tuple[str, int]:
    """The text and the number of tokens; after `at` chunks, call `then`."""
    text, tokens, chunks = "", 0, 0
    async for chunk in answer:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            chunks += 1
            if chunks == at and callable(then):
                then()
    return text, tokens


def kill(mesh: Up, module: str) -> None:
    """Kill every process of a kind: whichever it was, it held or served the stream."""
    for pid, line in children_of(mesh.process.pid).items():
        if module in line:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("module", ["worker_svc", "tokenizer_svc", "scheduler_svc", "cache_svc", "nats-server"])
async def test_text_is_undisturbed_by_the_death_of(mesh: Up, module: str) -> None:
    async with client(mesh) as openai:
        undisturbed = await read(await stream(openai))
        assert undisturbed[1] == NUM_TOKENS
        seen = len(mesh.lines)
        disturbed = await read(await stream(openai), 20, lambda: kill(mesh, module))
        assert disturbed == undisturbed
        mesh.wait_for(r"is ready again", since=seen)


async def test_one_of_two_workers_dies_and_the_other_goes_on(mesh: Up) -> None:
    async with client(mesh) as openai:
        undisturbed = await read(await stream(openai))
        seen = len(mesh.lines)
        answers = [await stream(openai) for _ in range(6)]
        kill_one = mesh.pid_of("worker_svc")
        texts = [await read(answers[0], 10, lambda: os.kill(kill_one, signal.SIGKILL))]
        texts += [await read(answer) for answer in answers[1:]]
        assert texts == [undisturbed] * 6
        mesh.wait_for(r"is ready again", since=seen)


async def test_seeded_sampling_goes_on_as_if_nothing_had_happened(mesh: Up) -> None:
    async with client(mesh) as openai:

        async def sampled(at: int = -1, then: object = None) -> tuple[str, int]:
            answer = await openai.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": REQUEST}],
                max_tokens=150,
                temperature=0.9,
                top_p=0.95,
                presence_penalty=0.5,
                seed=7,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            return await read(answer, at, then)

        undisturbed = await sampled()
        seen = len(mesh.lines)
        assert await sampled(20, lambda: kill(mesh, "worker_svc")) == undisturbed
        mesh.wait_for(r"is ready again", since=seen)


async def test_a_killed_gateway_frees_its_blocks(mesh: Up) -> None:
    async with client(mesh) as openai:
        answers = [await stream(openai) for _ in range(3)]
        seen = len(mesh.lines)
        kill(mesh, "gateway")
        mesh.wait_for(r"gateway-0 is ready again", since=seen)
        for answer in answers:
            with pytest.raises(Exception, match=r"."):  # the connection broke, however httpx says so
                await read(answer)
    await until(lambda: idle(mesh))


def idle(mesh: Up) -> bool:
    """Whether `weft top` shows no sequence at any worker."""
    rows = [line.split() for line in mesh.command("top").stdout.splitlines() if line.startswith("worker-")]
    return bool(rows) and all(row[3:5] == ["0", "0"] for row in rows)
