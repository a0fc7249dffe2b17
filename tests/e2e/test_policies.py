"""Requests that go through the ring more than once, because a policy says so: the text is what one pass gives.

A real mesh of the bundled model with a worker that prefills and one that decodes, which only `pd_heatmap` tells apart.
A third party on the bus sees what the scheduler assigns.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import nats, up
from tests.support.up import Up
from tests.support.wait import until
from weft import launch, subjects
from weft.bus import Bus
from weft.columns import unpack_u32
from weft.messages import Assignment, Control, ControlReply, Ended, Heartbeat, WorkerStatus
from weft.settings import MeshSettings

pytestmark = pytest.mark.timeout(180)
MODEL = "tales-1m"
DECODER = "decoder-0"
TALE = "There was once a poor woodcutter who lived with his wife and his two children by a great forest. "
GREEDY: dict[str, Any] = {"prompt": TALE * 6, "max_tokens": 500, "temperature": 0}
SEEDED: dict[str, Any] = {"prompt": TALE * 4, "max_tokens": 300, "temperature": 1, "seed": 7, "n": 2}
SHORT: dict[str, Any] = {"prompt": TALE, "max_tokens": 1, "temperature": 0}


@contextmanager
def decoder(nats_url: str, folder: Path) -> Iterator[None]:
    """A second worker, which is none of `weft up`."""
    settings = {"NATS_URL": nats_url, "MODEL": MODEL, "INSTANCE": DECODER, "ROLE": "decode", "KV_MEMORY": "64MiB"}
    command = [sys.executable, "-P", "-m", "worker_svc"]
    with (folder / "decoder.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *command],
            env=up.environ(folder) | {f"WEFT_{name}": value for name, value in settings.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def bus_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest.fixture(scope="module")
def mesh(bus_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("policies")
    argv = ("--nats-url", bus_url, "--model", MODEL, "--role", "prefill", "--kv-memory", "64MiB")
    with decoder(bus_url, folder), up.running(folder, *argv) as running:
        yield running


@dataclass
class Witness:
    """An operator who sees what is assigned, and switches policies."""

    bus: Bus
    statuses: dict[str, WorkerStatus] = field(default_factory=dict)  # by worker
    schedulers: set[str] = field(default_factory=set)
    assigned: list[tuple[str, Assignment]] = field(default_factory=list)  # and the worker's role
    lengths: list[int] = field(default_factory=list)  # of choices that ended, as their workers tell

    async def start(self) -> None:
        await self.bus.on(
            subjects.STATUS_ALL, WorkerStatus, lambda status: self.statuses.update({status.worker: status})
        )
        await self.bus.on(subjects.ALIVE_ALL, Heartbeat, self._on_beat)
        await self.bus.on(subjects.ENDED_ALL, Ended, self._on_ended)
        await until(lambda: self.schedulers and len(self.statuses) == 2, timeout_s=60)
        for name, status in self.statuses.items():
            await self.bus.on(subjects.assign(name), Assignment, partial(self._on_assignment, status.role))
        await self.bus.flush()

    async def switch(self, **changes: str) -> None:
        for name in self.schedulers:
            control = Control("policies", changes)
            reply = await self.bus.ask(subjects.control("scheduler", name), control, ControlReply, timeout_s=10)
            assert changes.items() <= reply.policies.items(), reply

    async def num_learnt(self) -> float:
        """Choices that predictions have learnt from."""
        (name,) = self.schedulers
        reply = await self.bus.ask(subjects.control("scheduler", name), Control("stats"), ControlReply, timeout_s=10)
        return reply.stats["predictions_total"]

    def _on_beat(self, beat: Heartbeat) -> None:
        if beat.role == "scheduler":
            self.schedulers.add(beat.instance)

    def _on_ended(self, ended: Ended) -> None:
        self.lengths += unpack_u32(ended.num_output_tokens)

    def _on_assignment(self, role: str, assignment: Assignment) -> None:
        self.assigned.append((role, assignment))


@pytest.fixture
async def witness(bus_url: str, mesh: Up) -> AsyncIterator[Witness]:
    """Of a mesh with the default policies."""
    bus = Bus(MeshSettings(nats_url=bus_url), "supervisor", "witness")
    await bus.connect()
    try:
        found = Witness(bus)
        await found.start()
        await found.switch(order="fcfs", route="prefix_aware")
        yield found
    finally:
        await bus.close()


async def completion(mesh: Up, asked: dict[str, Any]) -> Any:
    body = {"model": MODEL, "ignore_eos": True, **asked}
    async with aiohttp.ClientSession() as session, session.post(f"{mesh.url}/v1/completions", json=body) as response:
        answer = await response.json()
    assert response.status == 200, answer
    return answer


async def texts(mesh: Up, asked: dict[str, Any]) -> list[str]:
    """The texts of all choices, each of the length asked for."""
    answer = await completion(mesh, asked)
    choices = answer["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * len(choices)
    assert answer["usage"]["completion_tokens"] == asked["max_tokens"] * len(choices)
    return [choice["text"] for choice in choices]


@pytest.mark.parametrize("asked", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_text_of_a_request_whose_quanta_run_out_is_that_of_one_pass(
    mesh: Up, witness: Witness, asked: dict[str, Any]
) -> None:
    expected = await texts(mesh, asked)
    assert [made.stop_after for _, made in witness.assigned] == [None]
    await witness.switch(order="mlfq")
    assert await texts(mesh, asked) == expected
    again = [made for _, made in witness.assigned[1:]]
    assert len(again) >= 2 and all(made.stop_after for made in again)
    assert [(made.request.epoch, made.request.yield_epoch) for made in again] == [(i, i) for i in range(len(again))]


@pytest.mark.parametrize("asked", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_text_of_a_request_that_one_worker_prefills_and_another_decodes_is_that_of_one(
    mesh: Up, witness: Witness, asked: dict[str, Any]
) -> None:
    expected = await texts(mesh, asked)
    await witness.switch(route="pd_heatmap")
    assert await texts(mesh, asked) == expected
    assert [(role, made.stop_after, made.request.yield_epoch) for role, made in witness.assigned[1:]] == [
        ("prefill", 1, 0),
        ("decode", None, 1),
    ]


async def test_the_length_of_an_answer_that_a_stop_string_ends_is_learnt(mesh: Up, witness: Witness) -> None:
    learnt = await witness.num_learnt()
    (text,) = await texts(mesh, GREEDY)
    stop = text[len(text) // 4 :][:12]
    answer = await completion(mesh, GREEDY | {"stop": stop})
    assert answer["choices"][0]["finish_reason"] == "stop"
    await until(lambda: len(witness.lengths) == 2)
    assert witness.lengths == [500, answer["usage"]["completion_tokens"]] and witness.lengths[1] < 500
    async with asyncio.timeout(10):
        while await witness.num_learnt() < learnt + 2:
            pass


async def test_a_request_that_ends_with_its_first_token_is_not_handed_back(mesh: Up, witness: Witness) -> None:
    expected = await texts(mesh, SHORT)
    await witness.switch(route="pd_heatmap")
    assert await texts(mesh, SHORT) == expected
    assert [role for role, _ in witness.assigned[1:]] == ["prefill"]


async def test_policies_that_are_switched_while_requests_run_lose_none(mesh: Up, witness: Witness) -> None:
    asked = [GREEDY | {"prompt": f"{number} {TALE * 4}", "max_tokens": 300} for number in range(8)]
    expected = await asyncio.gather(*(texts(mesh, one) for one in asked))
    has_switched = asyncio.Event()

    async def ask_again(one: dict[str, Any]) -> set[str]:
        found = set(await texts(mesh, one))
        while not has_switched.is_set():
            found |= set(await texts(mesh, one))
        return found

    running = asyncio.gather(*(ask_again(one) for one in asked))
    for order, route in (("mlfq", "prefix_aware"), ("srpt", "pd_heatmap"), ("mlfq", "pd_heatmap"), ("fair", "random")):
        begun = len(witness.assigned)
        await witness.switch(order=order, route=route)
        # Some began before the switch, and some after.
        await until(lambda begun=begun: len(witness.assigned) >= begun + 4, timeout_s=60)
    has_switched.set()
    assert await running == [set(one) for one in expected]
    assert any(made.request.yield_epoch for _, made in witness.assigned)
    assert not any(made.request.is_recovered for _, made in witness.assigned)


async def test_worker_that_is_killed_between_quanta_costs_no_token(mesh: Up, witness: Witness) -> None:
    asked = [GREEDY | {"prompt": f"{number} {TALE * 4}"} for number in range(8)]
    expected = await asyncio.gather(*(texts(mesh, one) for one in asked))
    await witness.switch(order="mlfq")
    begun, killed = len(witness.assigned), len(mesh.lines)
    running = asyncio.gather(*(texts(mesh, one) for one in asked))
    await until(lambda: any(made.request.yield_epoch for _, made in witness.assigned[begun:]), timeout_s=60)
    os.kill(mesh.pid_of("worker_svc"), signal.SIGKILL)
    assert await running == expected
    again = [made.request for _, made in witness.assigned[begun:]]
    assert any(request.is_recovered for request in again)
    mesh.wait_for(r"worker-0\S* is ready again", since=killed)
