"""A worker of several processes, as a user has it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.support import up
from tests.support.processes import children_of, is_alive
from tests.support.up import Up
from tests.support.wait import until

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
ASKED = {"model": "tales-6m", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def rank_of(mesh: Up) -> int:
    """The process id of the worker's other rank."""
    return next(iter(children_of(mesh.pid_of("worker_svc"))))


async def write(mesh: Up, kill_after: int | None = None) -> str:
    """The text of a stream in the midst of which, if that is asked for, the other rank is killed."""
    parts: list[str] = []
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{mesh.url}/v1/completions", json=ASKED | {"stream": True}) as response,
    ):
        assert response.status == 200, await response.text()
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return "".join(parts)
            if data:
                event = json.loads(data)
                assert "choices" in event, event
                parts.append(event["choices"][0]["text"])
            if data and len(parts) == kill_after:
                os.kill(rank_of(mesh), signal.SIGKILL)
    raise AssertionError("the stream broke off")


async def test_stream_goes_on_when_a_rank_is_killed_and_no_rank_outlives_its_worker(tmp_path: Path) -> None:
    with up.running(tmp_path, "--tensor-parallel", "2", "--wait-for-role-s", "120") as mesh:
        text = await write(mesh)
        assert await write(mesh, kill_after=10) == text
        mesh.wait_for(r"worker-0 died \(exit status 1\)")
        rank = rank_of(mesh)
        os.kill(mesh.pid_of("worker_svc"), signal.SIGKILL)
        await until(lambda: not is_alive(rank))
        assert mesh.interrupt() == 0
