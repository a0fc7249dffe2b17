"""Forked workers as real processes: they say what others say, whole whatever is killed, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest
from tokenizers import Tokenizer

from tests.support import up
from tests.support.engine_requests import make_request
from tests.support.engine_runs import run
from tests.support.processes import children_of, command, is_alive
from tests.support.up import Up
from tests.support.wait import until
from weft import model_folder
from weft.messages import SamplingParams
from weft.settings import ModelSettings, WorkerSettings, load
from worker_svc.engine_io import Add
from worker_svc.torch_engine import load_engine

pytestmark = pytest.mark.timeout(120)
MODEL = model_folder.read(ModelSettings()).name
# Long enough for two threads to compute it.
PROMPT = "Once upon a time there was a fox who lived in a wood beside a wide river. " * 20
NUM_TOKENS = 60
ENGINE = ("--threads", "2", "--kv-memory", "64MiB")
FLAGS = (*ENGINE, "--scale", "queue", "--max-workers", "1", "--scale-idle-s", "100")


async def tell(mesh: Up, at: int = -1, then: Callable[[], None] = lambda: None) -> str:
    """The greedy text; after `at` events, call `then`."""
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, count = "", 0
    http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
    async with http, http.post(f"{mesh.url}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                text += "".join(choice["text"] for choice in json.loads(data)["choices"])
                count += 1
                if count == at:
                    then()
    assert count > at
    return text


def worker_of(mesh: Up) -> int:
    """The process id of the worker that runs, whichever way it was started."""
    log = (mesh.folder / "logs" / "supervisor.log").read_text()
    pid = int(re.findall(r'started child="worker-0" pid=(\d+)', log)[-1])
    assert pid in children_of(mesh.process.pid)
    return pid


def template_of(mesh: Up) -> int:
    worker = worker_of(mesh)
    those = children_of(mesh.process.pid)
    return next(pid for pid, line in those.items() if "--template" in line and pid != worker)


def unforked() -> str:
    """What an engine in this process says to the same."""
    settings = load(WorkerSettings, ["--device", "cpu", *ENGINE], {})
    folder = model_folder.read(settings.model)
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    request = make_request(tokenizer.encode(PROMPT).ids, digest=model_folder.digest(folder), sampling=sampling)
    engine = load_engine(folder, settings)
    text: str = tokenizer.decode(run(engine, [Add(request)]).tokens())
    engine.close()
    return text


async def test_forked_workers_serve_and_die_as_others_do(tmp_path: Path) -> None:
    with ExitStack() as stack:
        mesh = up.start(tmp_path, "--fork", *FLAGS)
        stack.callback(mesh.end)
        expected = await asyncio.to_thread(unforked)
        mesh.url = (await asyncio.to_thread(mesh.wait_for, r"^Weft serves \S+ at (\S+)"))[1]
        assert await tell(mesh) == expected and len(expected.split()) > 20
        first = worker_of(mesh)
        assert "--template" in command(first)

        assert await tell(mesh, 10, lambda: os.kill(first, signal.SIGKILL)) == expected
        second, seen = worker_of(mesh), len(mesh.lines)
        assert "--template" in command(second) and second != first

        os.kill(template_of(mesh), signal.SIGKILL)
        await asyncio.to_thread(mesh.wait_for, r"the template died \(signal 9, SIGKILL\)", since=seen)
        assert await tell(mesh) == expected and worker_of(mesh) == second

        children = children_of(mesh.process.pid)
        mesh.process.kill()
        mesh.process.wait()
        await until(lambda: not [pid for pid in children if is_alive(pid)])
        assert second in children


async def test_interrupt_ends_forked_workers_and_their_template_with_status_0(tmp_path: Path) -> None:
    with up.running(tmp_path, "--engine", "null", "--fork", "--workers", "2") as mesh:
        children = children_of(mesh.process.pid)
        assert sum("--template" in line for line in children.values()) == 3
        assert mesh.interrupt() == 0
    assert not [line for pid, line in children.items() if is_alive(pid)]
    assert "draining" in (tmp_path / "logs" / "worker-1.log").read_text()
