"""Scaling by docker compose: the commands, and with a `docker` that only writes down what it is told."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tests.support import nats
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.compose_scale import plan_commands
from weft.messages import ScaleAdvice
from weft.settings import MeshSettings

IDS = ["aaaaaaaaaaaa1111", "bbbbbbbbbbbb2222", "cccccccccccc3333"]


def advice(target: int, *drain: str) -> ScaleAdvice:
    return ScaleAdvice("s", "tales", target=target, drain=list(drain))


def test_more_workers_are_asked_of_compose_as_a_whole_number_of_them() -> None:
    (command,) = plan_commands(IDS, advice(5), "worker")
    assert command[:3] == ["docker", "compose", "up"]
    assert command[-3:] == ["--scale", "worker=5", "worker"]


def test_as_many_as_there_are_need_no_command() -> None:
    assert plan_commands(IDS, advice(3), "worker") == []


def test_the_container_of_the_worker_that_costs_least_is_stopped_and_removed() -> None:
    drain = [f"worker-{container[:12]}-1-ab" for container in (IDS[1], IDS[0], IDS[2])]
    stop, remove = plan_commands(IDS, advice(2, *drain), "worker")
    assert stop == ["docker", "stop", IDS[1]]
    assert remove == ["docker", "rm", IDS[1]]


def test_a_container_whose_worker_is_not_ready_goes_before_those_that_are() -> None:
    drain = [f"worker-{container[:12]}-1-ab" for container in IDS[:2]]
    assert plan_commands(IDS, advice(2, *drain), "worker")[0] == ["docker", "stop", IDS[2]]


async def test_advice_from_the_bus_becomes_commands(tmp_path: Path) -> None:
    docker, told = tmp_path / "docker", tmp_path / "told"
    docker.write_text(f'#!/bin/sh\necho "$@" >> {told}\ncase "$2" in ps) echo {IDS[0]};; esac\n')
    docker.chmod(0o755)
    with nats.running(tmp_path) as server:
        environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WEFT_NATS_URL": server.url}
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "weft.compose_scale", env=environ)
        bus = Bus(MeshSettings(nats_url=server.url), "scheduler", "s")
        await bus.connect()
        try:
            # It may not listen yet: advice comes again and again.
            await until(
                lambda: bus.tell(subjects.scale("tales"), advice(2)) or (told.exists() and "up" in told.read_text())
            )
        finally:
            process.kill()
            await process.wait()
            await bus.close()
    assert "compose up --detach --no-deps --no-recreate --scale worker=2 worker" in told.read_text()
