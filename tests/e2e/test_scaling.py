"""Scaling with real processes: from zero workers to one and back, and no request lost on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.support import nats, up
from tests.support.processes import children_of
from tests.support.up import Up
from tests.support.wait import until
from weft import model_folder, subjects
from weft.bus import Bus
from weft.messages import ScaleAdvice, StreamEvent
from weft.settings import MeshSettings, ModelSettings

pytestmark = pytest.mark.timeout(120)
MODEL = model_folder.read(ModelSettings()).name
NULL = ("--engine", "null", "--null-tokens-per-s", "200")


async def complete(mesh: Up, max_tokens: int) -> int:
    """How many tokens came."""
    body = {"model": MODEL, "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True}
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
    async with http, http.post(f"{mesh.url}/v1/completions", json=body) as got:
        answer = await got.json()
        assert got.status == 200, answer
        return int(answer["usage"]["completion_tokens"])


def num_workers(mesh: Up) -> int:
    return sum("worker_svc" in line for line in children_of(mesh.process.pid).values())


async def test_a_request_brings_a_worker_and_its_absence_ends_it(tmp_path: Path) -> None:
    flags = ("--scale", "queue", "--max-workers", "2", "--scale-idle-s", "1")
    with up.running(tmp_path, *NULL, *flags) as mesh:
        assert num_workers(mesh) == 0
        for _ in range(2):
            since = len(mesh.lines)
            assert await complete(mesh, 20) == 20
            assert num_workers(mesh) == 1
            await asyncio.to_thread(mesh.wait_for, r"worker-0 has drained and ended", since=since)
            assert num_workers(mesh) == 0
        assert mesh.interrupt() == 0


async def test_no_request_is_lost_when_a_worker_is_let_go_of(tmp_path: Path) -> None:
    flags = ("--scale", "fixed", "--max-workers", "2", "--scale-idle-s", "1", "--max-num-seqs", "4")
    with up.running(tmp_path, *NULL, *flags) as mesh:
        assert await complete(mesh, 1) == 1
        await asyncio.to_thread(mesh.wait_for, r"worker-1 is ready")
        # Those that come while the workers drain bring new ones.
        await asyncio.to_thread(mesh.wait_for, r"worker-\d has drained and ended")
        assert await asyncio.gather(*(complete(mesh, 40) for _ in range(12))) == [40] * 12
        assert not [line for line in mesh.lines if "died" in line]


async def test_a_worker_that_is_let_go_of_ends_its_streams_first(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        flags = (*NULL, "--nats-url", server.url, "--scale", "fixed", "--min-workers", "2", "--max-workers", "2")
        with up.running(tmp_path / "data", *flags) as mesh:
            bus = Bus(MeshSettings(nats_url=server.url), "scheduler", "s")
            await bus.connect()
            seen: set[str] = set()
            await bus.on(f"{subjects.PREFIX}.gateway.*.events", StreamEvent, lambda event: seen.add(event.request_id))
            running = [asyncio.create_task(complete(mesh, 200)) for _ in range(8)]
            await until(lambda: len(seen) == 8)
            bus.tell(subjects.scale(MODEL), ScaleAdvice("s", MODEL, target=1))
            assert await asyncio.gather(*running) == [200] * 8
            await asyncio.to_thread(mesh.wait_for, r"worker-\S+ has drained and ended")
            await bus.close()
            (log,) = (tmp_path / "data" / "logs").glob("gateway-*.log")
            assert log.read_text().count(" epochs=1 ") == 8
