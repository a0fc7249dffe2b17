"""A template forks processes that are children of whoever started the template."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.processes import children_of, command, is_alive
from tests.support.wait import until
from weft import launch
from weft.child import ChildSpec, News
from weft.errors import SettingsError
from weft.template import FLAG, READY, Template, children_in_group

STAND_IN = str(Path(__file__).parents[1] / "support" / "stand_in.py")
ENVIRON = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
ARGV = (sys.executable, "-P", STAND_IN, "worker", FLAG)
# It waits for a bus that is not there.
WORKER = ChildSpec("worker-0", "worker", ARGV[:-1], {**ENVIRON, "WEFT_NATS_URL": "nats://127.0.0.1:1"})


@pytest.fixture(autouse=True)
def adopted() -> Iterator[None]:
    """This process gets what templates fork; nothing of it is left."""
    launch.adopt_orphans()
    yield
    assert not children_of(os.getpid())


@asynccontextmanager
async def kept(tmp_path: Path, *argv: str, patience_s: float = 10.0) -> AsyncIterator[tuple[Template, list[int]]]:
    """A template that is kept, and the process ids of its lives."""
    pids: list[int] = []

    async def start() -> Process:
        with (tmp_path / "template.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(argv or ARGV), env=ENVIRON, stdin=PIPE, stdout=PIPE, stderr=log
            )
        pids.append(process.pid)
        return process

    news: list[News] = []
    template = Template(start, news.append, tmp_path / "template.log", patience_s=patience_s)
    keeping = asyncio.create_task(template.keep())
    try:
        yield template, pids
        if keeping.done():
            keeping.result()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await template.end()


async def test_what_is_forked_is_a_child_of_ours_whose_end_is_seen(tmp_path: Path) -> None:
    async with kept(tmp_path) as (template, pids):
        # Asked for before it has loaded.
        patient, hasty = await asyncio.gather(
            template.fork(WORKER, tmp_path / "worker-0.log", {}),
            template.fork(WORKER, tmp_path / "worker-1.log", {"WEFT_STARTUP_S": "0.1"}),
        )
        assert patient is not None and hasty is not None and len(pids) == 1
        assert {patient.pid, hasty.pid, *pids} == set(children_of(os.getpid()))
        assert await hasty.wait() == hasty.returncode == 1
        assert "no NATS server at" in (tmp_path / "worker-1.log").read_text()
        os.kill(patient.pid, signal.SIGKILL)
        assert await patient.wait() == patient.returncode == -signal.SIGKILL


async def test_a_template_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with kept(tmp_path, patience_s=0.5) as (template, pids):
        process = await template.fork(WORKER, tmp_path / "worker.log", {})
        assert process is not None
        # Until it goes on by itself, it ends with the template.
        await until((tmp_path / "worker.log").exists)
        os.kill(pids[0], signal.SIGSTOP)
        assert await template.fork(WORKER, tmp_path / "worker.log", {}) is None
        await until(lambda: len(pids) == 2)
        assert not is_alive(pids[0]) and is_alive(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()


async def test_refused_settings_are_said_by_the_template_itself(tmp_path: Path) -> None:
    refusing = "import sys; sys.stderr.write('worker_svc: the folder has no weights\\n'); sys.exit(2)"
    with pytest.raises(SettingsError, match=r"^template: the folder has no weights$"):
        async with kept(tmp_path, sys.executable, "-c", refusing) as (template, _):
            assert await template.fork(WORKER, tmp_path / "worker.log", {}) is None


async def test_without_a_template_nothing_is_forked(tmp_path: Path) -> None:
    async with kept(tmp_path, "/nowhere/python") as (template, _):
        assert await template.fork(WORKER, tmp_path / "worker.log", {}) is None


async def test_no_worker_goes_on_that_nobody_knows(tmp_path: Path) -> None:
    read, write = os.pipe()
    template = await asyncio.create_subprocess_exec(*ARGV, env=ENVIRON, stdin=PIPE, stdout=write)
    os.close(write)
    assert await asyncio.to_thread(os.read, read, len(READY)) == READY
    # It cannot tell of the worker that it forks, and dies of that.
    os.close(read)
    await template.communicate(b"{}\n")
    assert template.returncode == 1
    await until(lambda: not [pid for pid in children_of(os.getpid()) if STAND_IN in command(pid)])


async def test_a_fork_that_a_template_died_in_leaves_no_zombie(tmp_path: Path) -> None:
    read, write = os.pipe()
    reader, log = asyncio.StreamReader(), tmp_path / "template.log"
    answers, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
    )
    pids: list[int] = []

    async def start() -> Process:
        if pids:
            raise OSError("once is enough")
        process = await asyncio.create_subprocess_exec(
            *ARGV, env=ENVIRON, stdin=PIPE, stdout=write, start_new_session=True
        )
        os.close(write)
        process.stdout = reader
        pids.append(process.pid)
        return process

    news: list[News] = []
    template = Template(start, news.append, log)
    keeping = asyncio.create_task(template.keep())
    await until(lambda: news)
    # It forks, cannot tell of it, and dies of that.
    answers.close()
    assert await template.fork(WORKER, tmp_path / "worker.log", {}) is None
    await until(lambda: len(news) > 1)
    assert "died (exit status 1)" in news[1].text
    assert not children_in_group(pids[0])
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
