from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.support.processes import children_of, command, is_alive
from tests.support.wait import until
from weft import data_folder, listen, subjects
from weft.bus import Bus
from weft.child import ChildSpec, News, StartFailed, describe_status, restart_delay
from weft.data_folder import DataFolder
from weft.errors import SettingsError
from weft.messages import Heartbeat, Role, ScaleAdvice
from weft.settings import MeshSettings
from weft.supervisor import Supervisor

STAND_IN = str(Path(__file__).parents[1] / "support" / "stand_in.py")
PASSWORDS: dict[Role, str] = {role: secrets.token_hex(8) for role in subjects.PERMISSIONS}


@dataclass
class Running:
    supervisor: Supervisor
    folder: DataFolder
    news: list[News] = field(default_factory=list)

    def pid(self, name: str) -> int:
        process = self.supervisor.services[name].process
        assert process is not None
        return process.pid

    def texts(self) -> list[str]:
        return [news.text for news in self.news]


def spec(name: str, role: Role, behaviour: str = "") -> ChildSpec:
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ} | {
        "WEFT_NATS_USER": role,
        "WEFT_NATS_PASSWORD": PASSWORDS[role],
        "WEFT_INSTANCE": name,
    }
    return ChildSpec(name, role, (sys.executable, "-P", STAND_IN, role, behaviour), environ)


def make(
    tmp_path: Path,
    *specs: ChildSpec,
    hung_s: float = 20.0,
    scaled: Sequence[ChildSpec] = (),
    num_prewarmed: int = 0,
    is_forking: bool = False,
) -> Running:
    folder, _ = data_folder.take(str(tmp_path))
    news: list[News] = []
    supervisor = Supervisor(
        specs,
        MeshSettings(drain_s=5),
        PASSWORDS,
        folder,
        news.append,
        hung_s=hung_s,
        scaled=scaled,
        num_prewarmed=num_prewarmed,
        is_forking=is_forking,
    )
    return Running(supervisor, folder, news)


@asynccontextmanager
async def started(running: Running) -> AsyncIterator[Running]:
    """A supervisor that has all its children ready, and ends them all at the end."""
    task = asyncio.create_task(running.supervisor.run())
    ready = asyncio.create_task(running.supervisor.ready.wait())
    async with asyncio.timeout(30):
        await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    try:
        if task.done():
            await task
        yield running
    finally:
        running.supervisor.stop()
        with contextlib.suppress(SettingsError, StartFailed):
            await task


async def test_stop_ends_every_process_and_drains_those_that_are_ready(tmp_path: Path) -> None:
    running = make(tmp_path, spec("gateway-0", "gateway"), spec("worker-0", "worker"))
    async with started(running):
        pids = [child.process.pid for child in running.supervisor.children if child.process]
        assert len(pids) == 3
    assert not any(is_alive(pid) for pid in pids)
    assert "draining" in running.folder.log("gateway-0").read_text()
    assert not [text for text in running.texts() if "died" in text]


async def test_every_life_of_a_child_has_its_sockets_and_their_port_is_free_when_it_has_ended(tmp_path: Path) -> None:
    with listen.listening("127.0.0.1", 0) as (listener,):
        address, path = listener.getsockname(), f"fd/{listener.fileno()}"
        ours = os.readlink(f"/proc/self/{path}")
        running = make(tmp_path, replace(spec("gateway-0", "gateway"), sockets=(listener,)))
        async with started(running):
            assert os.readlink(f"/proc/{running.pid('gateway-0')}/{path}") == ours
            os.kill(running.pid("gateway-0"), signal.SIGKILL)
            await until(lambda: "gateway-0 is ready again" in " ".join(running.texts()))
            assert os.readlink(f"/proc/{running.pid('gateway-0')}/{path}") == ours
        socket.create_server(address).close()


async def test_killed_child_is_announced_dead_and_started_again(tmp_path: Path) -> None:
    running = make(tmp_path, spec("worker-0", "worker"))
    async with started(running), listening(running) as beats:
        first = running.pid("worker-0")
        await until(lambda: any(beat.instance == "worker-0" for beat in beats))
        epoch = beats[-1].epoch
        os.kill(first, signal.SIGKILL)
        await until(lambda: any(beat.state == "dead" for beat in beats))
        dead = next(beat for beat in beats if beat.state == "dead")
        assert (dead.role, dead.instance, dead.epoch) == ("worker", "worker-0", epoch)
        await until(lambda: running.supervisor.services["worker-0"].state == "ready")
        assert running.pid("worker-0") != first
        assert beats[-1].epoch > epoch
    assert "worker-0 died (signal 9, SIGKILL); starting it again in 0.1 s" in running.texts()
    assert running.texts()[-1].startswith("worker-0 is ready again after")


async def test_killed_nats_comes_back_on_the_same_port_and_children_stay(tmp_path: Path) -> None:
    running = make(tmp_path, spec("worker-0", "worker"))
    async with started(running):
        nats, worker, url = running.supervisor.nats, running.pid("worker-0"), running.supervisor.nats_url
        assert nats is not None and nats.process is not None
        os.kill(nats.process.pid, signal.SIGKILL)
        await until(lambda: "nats is ready again" in " ".join(running.texts()))
        assert running.supervisor.nats_url == url
        assert running.pid("worker-0") == worker


async def test_child_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    running = make(tmp_path, spec("worker-0", "worker"), hung_s=1.0)
    async with started(running):
        first = running.pid("worker-0")
        os.kill(first, signal.SIGSTOP)
        await until(lambda: "worker-0 is ready again" in " ".join(running.texts()))
        assert not is_alive(first)


async def test_child_that_refuses_its_settings_ends_all_with_its_own_sentence(tmp_path: Path) -> None:
    running = make(tmp_path, spec("gateway-0", "gateway"), spec("worker-0", "worker", "refuse"))
    with pytest.raises(SettingsError, match=r"^worker-0: the folder has no weights$"):
        async with started(running):
            pass
    assert not children_of(os.getpid())


async def test_child_that_never_starts_ends_all_after_some_tries(tmp_path: Path) -> None:
    running = make(tmp_path, spec("cache-0", "cache", "crash"))
    with pytest.raises(StartFailed, match=r"cache-0 died \(exit status 3\), 5 times while starting: something snapped"):
        async with started(running):
            pass


async def test_drained_child_is_started_again_without_delay(tmp_path: Path) -> None:
    running = make(tmp_path, spec("worker-0", "worker"))
    async with started(running):
        os.kill(running.pid("worker-0"), signal.SIGTERM)
        await until(lambda: "worker-0 is ready again" in " ".join(running.texts()))
    assert "worker-0 has drained; starting it again" in running.texts()


async def test_stop_while_starting_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    running = make(tmp_path, spec("worker-0", "worker"))
    task = asyncio.create_task(running.supervisor.run())
    await until(lambda: running.supervisor.services["worker-0"].process)
    pid = running.pid("worker-0")
    running.supervisor.stop()
    async with asyncio.timeout(5):
        await task
    assert not is_alive(pid)


def test_delays_double_up_to_ten_seconds() -> None:
    assert [restart_delay(failures) for failures in range(1, 10)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_statuses_are_said_in_words() -> None:
    assert describe_status(-9) == "signal 9, SIGKILL"
    assert describe_status(1) == "exit status 1"
    assert describe_status(-250) == "signal 250"


@asynccontextmanager
async def listening(running: Running) -> AsyncIterator[list[Heartbeat]]:
    """What a gateway hears."""
    mesh = MeshSettings(
        nats_url=running.supervisor.nats_url, nats_user="gateway", nats_password=PASSWORDS["gateway"], instance="g"
    )
    bus = Bus(mesh, "gateway", "g")
    await bus.connect()
    beats: list[Heartbeat] = []
    await bus.on(subjects.ALIVE_ALL, Heartbeat, beats.append)
    await bus.flush()
    yield beats
    await bus.close()


async def test_child_whose_program_is_missing_ends_all(tmp_path: Path) -> None:
    gone = ChildSpec("worker-0", "worker", ("/nowhere/python",), {})
    with pytest.raises(StartFailed, match="worker-0 died"):
        async with started(make(tmp_path, gone)):
            pass


async def test_child_that_ends_well_before_it_was_ready_has_failed(tmp_path: Path) -> None:
    idle = ChildSpec("cache-0", "cache", (sys.executable, "-c", "pass"), {})
    with pytest.raises(StartFailed, match=r"cache-0 died \(exit status 0\), 5 times while starting: it said nothing"):
        async with started(make(tmp_path, idle)):
            pass


@asynccontextmanager
async def advising(running: Running) -> AsyncIterator[Callable[..., None]]:
    """Speak as a scheduler."""
    mesh = MeshSettings(
        nats_url=running.supervisor.nats_url, nats_user="scheduler", nats_password=PASSWORDS["scheduler"], instance="s"
    )
    bus = Bus(mesh, "scheduler", "s")
    await bus.connect()

    def advise(target: int | None, *drain: str) -> None:
        bus.tell(subjects.scale("tales"), ScaleAdvice("s", "tales", target=target, drain=list(drain)))

    yield advise
    await bus.close()


async def test_workers_are_started_and_drained_as_advised(tmp_path: Path) -> None:
    scaled = [spec(f"worker-{number}", "worker") for number in range(3)]
    running = make(tmp_path, spec("scheduler-0", "scheduler"), scaled=scaled)
    services = running.supervisor.services
    async with started(running), advising(running) as advise:
        advise(2)
        await until(lambda: [child.state for child in services.values()] == ["ready"] * 3)
        pid = running.pid("worker-0")
        advise(None)
        advise(1, "worker-0")
        await until(lambda: "worker-0" not in services)
        assert not is_alive(pid)
        assert "draining" in running.folder.log("worker-0").read_text()
        advise(9)
        await until(lambda: [child.state for child in services.values()] == ["ready"] * 4)
    assert not [text for text in running.texts() if "died" in text or "starting it again" in text]


async def test_a_worker_that_is_needed_no_more_before_it_was_there_is_ended(tmp_path: Path) -> None:
    slow = ChildSpec("worker-0", "worker", (sys.executable, "-c", "import threading; threading.Event().wait()"), {})
    running = make(tmp_path, spec("scheduler-0", "scheduler"), scaled=[slow])
    services = running.supervisor.services
    async with started(running), advising(running) as advise:
        advise(1)
        await until(lambda: "worker-0" in services and services["worker-0"].process is not None)
        pid = running.pid("worker-0")
        advise(0)
        await until(lambda: "worker-0" not in services)
        assert not is_alive(pid)


async def test_a_prewarmed_process_becomes_the_worker_that_is_needed(tmp_path: Path) -> None:
    worker = spec("worker-0", "worker")
    running = make(tmp_path, spec("scheduler-0", "scheduler"), scaled=[worker], num_prewarmed=1)
    services = running.supervisor.services
    async with started(running), advising(running) as advise:
        await until(lambda: any("--prewarm" in line for line in children_of(os.getpid()).values()))
        warm = next(pid for pid, line in children_of(os.getpid()).items() if "--prewarm" in line)
        advise(1)
        await until(lambda: "worker-0" in services and services["worker-0"].state == "ready")
        assert running.pid("worker-0") == warm
        assert "ready" in running.folder.log("worker-0").read_text()
        await until(lambda: any("--prewarm" in line and pid != warm for pid, line in children_of(os.getpid()).items()))
    assert not children_of(os.getpid())


def forked(running: Running) -> list[int]:
    """Workers that are forks of the template, and children of the supervisor."""
    pids = [child.process.pid for child in running.supervisor.services.values() if child.process]
    return [pid for pid in pids if "--template" in command(pid) and pid in children_of(os.getpid())]


def template_of(running: Running) -> int:
    """The process id of the template."""
    workers = forked(running)
    return next(pid for pid, line in children_of(os.getpid()).items() if "--template" in line and pid not in workers)


async def test_workers_are_forked_and_a_killed_one_is_forked_again(tmp_path: Path) -> None:
    specs = [spec("worker-0", "worker"), spec("worker-1", "worker")]
    running = make(tmp_path, *specs, is_forking=True)
    async with started(running):
        first = running.pid("worker-0")
        assert len(forked(running)) == 2
        os.kill(first, signal.SIGKILL)
        await until(lambda: "worker-0 is ready again" in " ".join(running.texts()))
        assert len(forked(running)) == 2 and running.pid("worker-0") != first
        assert "ready" in running.folder.log("worker-1").read_text()
    assert "worker-0 died (signal 9, SIGKILL); starting it again in 0.1 s" in running.texts()
    assert "draining" in running.folder.log("worker-1").read_text()
    assert not children_of(os.getpid())


async def test_workers_outlive_the_template_and_there_is_another(tmp_path: Path) -> None:
    running = make(tmp_path, spec("worker-0", "worker"), is_forking=True)
    async with started(running):
        worker, first = running.pid("worker-0"), template_of(running)
        os.kill(first, signal.SIGKILL)
        await until(lambda: sum("the template is ready" in text for text in running.texts()) == 2)
        assert running.pid("worker-0") == worker and is_alive(worker) and template_of(running) != first
        os.kill(worker, signal.SIGKILL)
        await until(lambda: "worker-0 is ready again" in " ".join(running.texts()))
        assert len(forked(running)) == 1
    died = "the template died (signal 9, SIGKILL); workers start without it until it is there again"
    assert died in running.texts()


async def test_forked_workers_come_and_go_as_advised(tmp_path: Path) -> None:
    scaled = [spec(f"worker-{number}", "worker") for number in range(2)]
    running = make(tmp_path, spec("scheduler-0", "scheduler"), scaled=scaled, is_forking=True)
    services = running.supervisor.services
    async with started(running), advising(running) as advise:
        for _ in range(2):
            advise(2)
            await until(lambda: [child.state for child in services.values()] == ["ready"] * 3)
            assert len(forked(running)) == 2
            advise(0, "worker-0", "worker-1")
            await until(lambda: list(services) == ["scheduler-0"])
    assert not [text for text in running.texts() if "died" in text or "starting it again" in text]


async def test_a_worker_that_is_needed_no_more_before_the_template_has_loaded_is_ended(tmp_path: Path) -> None:
    running = make(tmp_path, spec("scheduler-0", "scheduler"), scaled=[spec("worker-0", "worker")], is_forking=True)
    services = running.supervisor.services
    async with started(running), advising(running) as advise:
        os.kill(template_of(running), signal.SIGSTOP)
        advise(1)
        await until(lambda: "worker-0" in services)
        advise(0)
        await until(lambda: services["worker-0"].is_leaving)
        os.kill(template_of(running), signal.SIGCONT)
        await until(lambda: "worker-0" not in services)
