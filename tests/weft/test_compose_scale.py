"""Scaling by docker compose: what it decides, and what it does with a `docker` whose containers are files."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from tests.support import nats
from tests.support.wait import until
from weft import subjects
from weft.bus import Bus
from weft.compose_scale import LISTEN, Plan, Workers, plan
from weft.messages import ScaleAdvice
from weft.settings import ComposeScaleSettings, MeshSettings

IDS = ["aaaaaaaaaaaa1111", "bbbbbbbbbbbb2222", "cccccccccccc3333"]
SHORT = [container[:12] for container in IDS]
# `stop` and `ps` wait for a line from the pipe of that name, if there is one.
DOCKER = """#!/bin/sh
cd {folder}
echo "$@" >> told
case "$1 $2" in
"compose version") ;;
"compose ps") listed=$(ls containers); [ -p ps ] && echo counted >> told && read _ < ps; echo "$listed" ;;
"compose exec") exec {python} -m weft.advice ;;
"compose up")
    if [ -e fails ]; then rm fails; echo "  Container starting" >&2; echo "no space left" >&2; exit 1; fi
    for size; do case $size in worker=*) break ;; esac; done
    while [ $(ls containers | wc -l) -lt ${{size#worker=}} ]; do touch containers/$(ls containers | wc -l)ddddddddddd4444; done ;;
"stop "*) [ -p stop ] && read _ < stop; true ;;
"rm "*) rm containers/$2* ;;
*) echo "unknown command" >&2; echo "Run 'docker --help' for more information" >&2; exit 1 ;;
esac
"""  # noqa: E501


def advice(target: int, *drain: str) -> ScaleAdvice:
    return ScaleAdvice("s", "tales", target=target, drain=[f"worker-{container[:12]}-1-ab" for container in drain])


class Docker:
    """The stand-in, first on a path."""

    def __init__(self, folder: Path, containers: list[str]) -> None:
        self.folder = folder
        (folder / "containers").mkdir()
        for container in containers:
            (folder / "containers" / container).touch()
        (folder / "docker").write_text(DOCKER.format(folder=folder, python=sys.executable))
        (folder / "docker").chmod(0o755)
        self.path = f"{folder}:{os.environ['PATH']}"

    @property
    def containers(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "containers").iterdir())

    @property
    def told(self) -> str:
        path = self.folder / "told"
        return path.read_text() if path.exists() else ""

    def hold(self, command: str) -> None:
        os.mkfifo(self.folder / command)

    async def let_go(self, command: str) -> None:
        """Let a command that is held come to its end, and hold no other."""
        pipe = self.folder / command
        await asyncio.to_thread(pipe.write_text, "\n")
        pipe.unlink()


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Docker]:
    found = Docker(tmp_path, IDS)
    monkeypatch.setenv("PATH", found.path)
    yield found
    # A test that fails leaves no command that waits for ever.
    for pipe in (path for path in tmp_path.iterdir() if path.is_fifo()):
        with open(os.open(pipe, os.O_RDWR), "w") as end:
            end.write("\n")


def test_more_workers_are_asked_of_compose_as_a_whole_number_of_them() -> None:
    command = plan(IDS, 0, advice(5), "worker").command
    assert command[:3] == ("docker", "compose", "up")
    assert command[-3:] == ("--scale", "worker=5", "worker")


def test_containers_that_drain_are_no_workers_but_compose_counts_them() -> None:
    assert plan(IDS[:1], 2, advice(2), "worker").command[-2] == "worker=4"
    assert plan(IDS[:1], 2, advice(1), "worker") == Plan()


def test_as_many_as_there_are_need_nothing() -> None:
    assert plan(IDS, 0, advice(3), "worker") == Plan()


def test_the_container_of_the_worker_that_costs_least_drains() -> None:
    assert plan(IDS, 0, advice(2, IDS[1], IDS[0], IDS[2]), "worker") == Plan(leaving=(SHORT[1],))


def test_a_container_whose_worker_is_not_ready_goes_before_those_that_are() -> None:
    assert plan(IDS, 0, advice(2, *IDS[:2]), "worker") == Plan(leaving=(SHORT[2],))


def test_services_that_it_speaks_of_are_in_the_compose_file() -> None:
    services = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text())["services"]
    assert {LISTEN[4], ComposeScaleSettings().service} <= services.keys()


async def test_a_container_is_stopped_and_removed(docker: Docker) -> None:
    async with asyncio.TaskGroup() as group:
        await Workers("worker").apply(advice(2, *IDS), group)
    assert docker.told.splitlines()[-2:] == [f"stop {SHORT[0]}", f"rm {SHORT[0]}"]
    assert docker.containers == IDS[1:]


async def test_workers_are_started_while_another_drains(docker: Docker) -> None:
    docker.hold("stop")
    workers = Workers("worker")
    async with asyncio.TaskGroup() as group:
        await workers.apply(advice(2, *IDS), group)
        await workers.apply(advice(3), group)
        assert len(docker.containers) == 4
        await docker.let_go("stop")
    assert IDS[0] not in docker.containers
    assert len(docker.containers) == 3


async def test_one_that_goes_while_compose_counts_is_not_counted(docker: Docker) -> None:
    workers = Workers("worker")
    docker.hold("stop")
    async with asyncio.TaskGroup() as group:
        await workers.apply(advice(2, *IDS), group)
        docker.hold("ps")
        # The schedulers know of two workers, and name none that should go.
        counting = asyncio.create_task(workers.apply(advice(2), group))
        await until(lambda: "counted" in docker.told)
        await docker.let_go("stop")
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name().startswith("drain")))
        await docker.let_go("ps")
        await counting
    assert docker.containers == IDS[1:]


async def test_compose_is_not_asked_again_at_once_when_all_is_as_advised(docker: Docker) -> None:
    workers = Workers("worker")
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            await workers.apply(advice(3), group)
        assert docker.told.count("compose ps") == 1
        await workers.apply(advice(4), group)
    assert len(docker.containers) == 4


@asynccontextmanager
async def running(docker: Docker, url: str) -> AsyncIterator[tuple[Process, Bus]]:
    """It as a process, and a scheduler's bus."""
    process = await start(docker.path, WEFT_NATS_URL=url)
    bus = Bus(MeshSettings(nats_url=url), "scheduler", "s")
    await bus.connect()
    try:
        yield process, bus
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await bus.close()


async def start(path: str, **environ: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "weft.compose_scale", stderr=PIPE, env=os.environ | {"PATH": path} | environ
    )


async def test_advice_reaches_it_through_a_schedulers_container(docker: Docker) -> None:
    with nats.running(docker.folder) as server:
        async with running(docker, server.url) as (_, bus):
            # It may not listen yet: advice comes again and again.
            await until(lambda: bus.tell(subjects.scale("tales"), advice(4)) or len(docker.containers) == 4)
    assert "compose exec -T scheduler python -m weft.advice" in docker.told
    assert "compose up --detach --no-deps --no-recreate --scale worker=4 worker" in docker.told


async def test_a_command_that_fails_is_named_and_tried_again(docker: Docker) -> None:
    (docker.folder / "fails").touch()
    with nats.running(docker.folder) as server:
        async with running(docker, server.url) as (process, bus):
            await until(lambda: bus.tell(subjects.scale("tales"), advice(4)) or len(docker.containers) == 4)
            process.terminate()
            assert process.stderr is not None
            errors = (await process.stderr.read()).decode()
    assert "--scale worker=4 worker: no space left" in errors


async def test_without_docker_it_ends_with_a_sentence(tmp_path: Path) -> None:
    process = await start(str(tmp_path))
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().startswith("compose_scale: there is no command `docker`")


async def test_what_docker_complains_of_at_the_start_ends_it(docker: Docker) -> None:
    (docker.folder / "docker").write_text(DOCKER.format(folder=docker.folder, python="").replace("compose version", ""))
    process = await start(docker.path)
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().startswith("compose_scale: docker compose version: unknown command (run this where")
