"""A service's life, as a real process on a real NATS server."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support import nats
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.messages import Control, ControlReply, Heartbeat
from weft.settings import MeshSettings

# A cache that holds nothing: answers on its subject, drains for as long as it is told.
ECHO = """
import asyncio, sys
from weft import subjects
from weft.messages import BlockHas, BlockHasReply
from weft.service import main
from weft.settings import CacheSettings

class Echo:
    def __init__(self, settings, context):
        self.settings, self.context = settings, context
    async def start(self):
        async def answer(has):
            return BlockHasReply(b"\\1")
        await self.context.bus.answer(subjects.cache(self.context.instance), BlockHas, answer)
        if self.settings.disk_path == "fail":
            async def fail():
                raise RuntimeError("task failed")
            self.context.spawn(fail(), "failing")
    async def drain(self):
        if self.settings.disk_path == "slow":
            await asyncio.Event().wait()
    async def stop(self): pass
    def models(self): return ["m"]
    def is_live(self): return True
    def stats(self): return {"answers": 1.0}
    def snapshot(self): return None

main(CacheSettings, "cache", Echo, prog="echo")
"""


@asynccontextmanager
async def echo(url: str, tmp_path: Path, **settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WEFT_")}
    settings = {"nats_url": url, "instance": "cache-0"} | settings
    environ |= {f"WEFT_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[tuple[Bus, list[Heartbeat]]]:
    bus = Bus(MeshSettings(nats_url=url), "supervisor", "s1")
    await bus.connect()
    beats: list[Heartbeat] = []
    await bus.on(subjects.ALIVE_ALL, Heartbeat, beats.append)
    await bus.flush()
    try:
        yield bus, beats
    finally:
        await bus.close()


async def ready(beats: list[Heartbeat]) -> None:
    await until(lambda: any(beat.state == "ready" for beat in beats), timeout_s=30)


async def test_service_lives_from_start_to_drain(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        async with watching(server.url) as (bus, beats), echo(server.url, tmp_path) as process:
            await ready(beats)
            reply = await bus.ask(subjects.control("cache", "cache-0"), Control("stats"), ControlReply, timeout_s=5)
            assert reply == ControlReply("ready", {"answers": 1.0})
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            await until(lambda: beats[-1].state == "dead")
        states = list(dict.fromkeys(beat.state for beat in beats))
        assert states == ["starting", "ready", "draining", "dead"]
        assert {beat.models == ["m"] for beat in beats} == {True}


async def test_a_ready_service_hears_what_is_sent_to_it(tmp_path: Path) -> None:
    # Core NATS keeps nothing: a service must have subscribed before it says that it is ready.
    from weft.messages import BlockHas, BlockHasReply

    with nats.running(tmp_path) as server:
        async with watching(server.url) as (bus, beats), echo(server.url, tmp_path):
            await ready(beats)
            held = await bus.ask(subjects.cache("cache-0"), BlockHas(bytes(16)), BlockHasReply, timeout_s=5)
            assert held.held == b"\1"


async def test_drain_from_the_bus_ends_the_process(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        async with watching(server.url) as (bus, beats), echo(server.url, tmp_path) as process:
            await ready(beats)
            await bus.ask(subjects.control("cache", "cache-0"), Control("drain"), ControlReply, timeout_s=5)
            assert await process.wait() == 0


async def test_drain_ends_at_its_deadline(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        async with (
            watching(server.url) as (_, beats),
            echo(server.url, tmp_path, disk_path="slow", drain_s=0.1) as process,
        ):
            await ready(beats)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        async with watching(server.url) as (_, beats), echo(server.url, tmp_path, disk_path="slow") as process:
            await ready(beats)
            process.send_signal(signal.SIGTERM)
            await until(lambda: beats[-1].state == "draining")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 128 + signal.SIGTERM


async def test_a_failed_background_task_ends_the_process(tmp_path: Path) -> None:
    with nats.running(tmp_path) as server:
        async with watching(server.url), echo(server.url, tmp_path, disk_path="fail") as process:
            _, stderr = await process.communicate()
            assert process.returncode == 1
            assert b"task failed" in stderr


async def test_a_bad_setting_ends_with_one_sentence_and_status_2(tmp_path: Path) -> None:
    async with echo("nats://127.0.0.1:1", tmp_path, memory_size="lots") as process:
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert stderr.decode() == "echo: WEFT_MEMORY_SIZE: 'lots' is no size such as 256MiB or 2GiB\n"


async def test_without_nats_the_process_ends_with_one_sentence(tmp_path: Path) -> None:
    async with echo("nats://127.0.0.1:1", tmp_path, startup_s=0.2) as process:
        _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode().splitlines()[-1].startswith("echo: no NATS server at nats://127.0.0.1:1 within 0.2 s")


async def test_metrics_live_and_ready_are_served(tmp_path: Path, unused_tcp_port: int) -> None:
    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{unused_tcp_port}{path}") as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    with nats.running(tmp_path) as server:
        async with watching(server.url) as (_, beats), echo(server.url, tmp_path, metrics_port=unused_tcp_port):
            await ready(beats)
            status, body = await asyncio.to_thread(get, "/metrics")
            assert status == 200
            assert "weft_bus_sent_total" in body
            assert "weft_cache_answers 1.0" in body
            assert await asyncio.to_thread(get, "/live") == (200, "ok\n")
            assert await asyncio.to_thread(get, "/ready") == (200, "ok\n")
            assert (await asyncio.to_thread(get, "/other"))[0] == 404
