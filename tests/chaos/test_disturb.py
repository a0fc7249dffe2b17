"""Processes that sleep, drain and lose their clients: every stream has the text that it would have had.

A real mesh of two null workers, whose tokens are a function of the seed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest

from tests.support import up
from tests.support.processes import children_of
from tests.support.up import Up
from tests.support.wait import until
from weft import model_folder
from weft.settings import ModelSettings

pytestmark = pytest.mark.timeout(120)
MODEL = model_folder.read(ModelSettings()).name


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("disturb")
    with up.running(folder, "--workers", "2", "--engine", "null", "--null-tokens-per-s", "200") as running:
        yield running


@pytest.fixture
async def http(mesh: Up) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mesh.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def read(
    http: aiohttp.ClientSession, seed: int, num_tokens: int, then: Callable[[], None] = lambda: None, n: int = 1
) -> list[str]:
    """The texts of a stream that ended as it should; `then` is called once it is under way."""
    body = {"model": MODEL, "prompt": "Once", "max_tokens": num_tokens, "seed": seed, "n": n, "stream": True}
    texts, finishes, chunks, last = [""] * n, 0, 0, ""
    async with http.post("/v1/completions", json={**body, "ignore_eos": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            last = line.decode().strip().removeprefix("data: ") or last
            if last.startswith("{"):
                [choice] = json.loads(last)["choices"]
                texts[choice["index"]] += choice["text"]
                finishes += choice["finish_reason"] == "length"
                chunks += 1
                if chunks == 20:
                    then()
                last = ""
    assert (last, finishes) == ("[DONE]", n)
    return texts


def send(mesh: Up, module: str, number: signal.Signals, *, count: int = 9) -> None:
    """Send a signal to the first `count` processes of a kind."""
    found = [pid for pid, line in sorted(children_of(mesh.process.pid).items()) if module in line]
    for pid in found[:count]:
        os.kill(pid, number)


def rows(mesh: Up) -> list[list[str]]:
    """The workers in `weft top`."""
    return [line.split() for line in mesh.command("top").stdout.splitlines() if line.startswith("worker-")]


def is_idle(mesh: Up) -> bool:
    """Whether both workers are there and hold nothing."""
    return [row[3:5] for row in rows(mesh)] == [["0", "0"]] * 2


async def test_a_worker_that_slept_is_fenced(mesh: Up, http: aiohttp.ClientSession) -> None:
    undisturbed = await asyncio.gather(*(read(http, seed, 100) for seed in range(2)))
    try:
        first = read(http, 0, 100, lambda: send(mesh, "worker_svc", signal.SIGSTOP, count=1))
        texts = await asyncio.gather(first, *(read(http, seed % 2, 100) for seed in range(1, 8)))
    finally:
        # It goes on with what it held, at epochs that are over.
        send(mesh, "worker_svc", signal.SIGCONT)
    assert texts == undisturbed * 4
    assert await asyncio.gather(*(read(http, seed % 2, 100) for seed in range(8))) == undisturbed * 4
    await until(lambda: is_idle(mesh), timeout_s=20)


async def test_a_gateway_that_slept_goes_on_with_its_streams(mesh: Up, http: aiohttp.ClientSession) -> None:
    undisturbed = await read(http, 0, 400)
    stopped = asyncio.Event()

    def stop() -> None:
        send(mesh, "gateway", signal.SIGSTOP)
        stopped.set()

    stream = asyncio.create_task(read(http, 0, 400, stop))
    try:
        await stopped.wait()
        # Silent, it counts as dead: the workers let go of what is its.
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(is_idle, mesh):
                pass
    finally:
        send(mesh, "gateway", signal.SIGCONT)
    assert await stream == undisturbed


async def test_every_role_drains_under_load_without_a_failed_request(mesh: Up, http: aiohttp.ClientSession) -> None:
    undisturbed = await read(http, 0, 30)
    drained = asyncio.Event()

    async def load() -> int:
        requests = 0
        while not drained.is_set():
            assert await read(http, 0, 30) == undisturbed
            requests += 1
        return requests

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(load()) for _ in range(8)]
        for instance in ("worker-0", "scheduler-0", "tokenizer-0", "cache-0"):
            seen = len(mesh.lines)
            done = await asyncio.to_thread(mesh.command, "drain", instance)
            assert done.returncode == 0, done.stderr
            await asyncio.to_thread(mesh.wait_for, rf"{instance} is ready again", since=seen)
        drained.set()
    assert all(client.result() for client in clients)


async def test_clients_that_leave_at_random_moments_leave_nothing_behind(mesh: Up, http: aiohttp.ClientSession) -> None:
    chance = random.Random(1)

    async def leave(number: int) -> None:
        try:
            async with asyncio.timeout(chance.random() ** 2 * 0.5):
                await read(http, number, 200, n=8 if number % 3 else 1)
        except TimeoutError:
            pass

    await asyncio.gather(*(leave(number) for number in range(100)))
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(is_idle, mesh):
            pass
    assert {row[5] for row in rows(mesh)} == {"8192/8192"}
    assert await read(http, 0, 10)
