"""`weft up` as a user has it: real processes, a real HTTP client, real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support import up
from tests.support.processes import children_of, is_alive
from tests.support.up import Up
from tests.support.wait import until
from weft import model_folder
from weft.settings import ModelSettings

pytestmark = pytest.mark.timeout(120)
MODEL = model_folder.read(ModelSettings()).name
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a tale about a fox"}], "stream": True}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One mesh of null engines for the tests that leave it as they found it."""
    with up.running(tmp_path_factory.mktemp("mesh"), "--engine", "null", "--null-tokens-per-s", "50") as running:
        yield running


def start_in_terminal(mesh: Up, *argv: str) -> tuple[subprocess.Popen[bytes], int]:
    """A weft command, and our end of the terminal that it runs in."""
    ours, theirs = os.openpty()
    # `setsid -c` makes it the terminal that Ctrl-C comes from.
    process = subprocess.Popen(
        ["setsid", "-c", up.WEFT, *argv], stdin=theirs, stdout=theirs, stderr=theirs, env=up.environ(mesh.folder)
    )
    os.close(theirs)
    return process, ours


class Terminal:
    """What a program has written to its terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = ""

    async def see(self, wanted: str, *, times: int = 1) -> None:
        """Read until `wanted` has come so many times since the last call."""
        async with asyncio.timeout(20):
            while self._text.count(wanted) < times:
                self._text += (await asyncio.to_thread(os.read, self._descriptor, 4096)).decode(errors="replace")
        self._text = ""


async def events(url: str, **asked: object) -> AsyncIterator[dict[str, object]]:
    """The events of a streamed answer; raises if it ends without `[DONE]`."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json={**ASKED, **asked}) as response,
    ):
        assert response.status == 200, await response.text()
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
    raise AssertionError("the stream broke off")


async def test_stream_goes_on_when_its_worker_is_killed(mesh: Up) -> None:
    seen = len(mesh.lines)
    received = []
    asked = {"max_tokens": 60, "ignore_eos": True, "stream_options": {"include_usage": True}}
    async for event in events(mesh.url, **asked):
        received.append(event)
        if len(received) == 10:
            os.kill(mesh.pid_of("worker_svc"), signal.SIGKILL)
    assert received[-1]["usage"]["completion_tokens"] == 60  # type: ignore[index]  # decoded JSON
    mesh.wait_for(r"worker-0 died \(signal 9, SIGKILL\); starting it again in 0\.1 s", since=seen)
    mesh.wait_for(r"worker-0 is ready again", since=seen)


async def test_killed_nats_is_back_at_once(mesh: Up) -> None:
    seen = len(mesh.lines)
    os.kill(mesh.pid_of("nats-server"), signal.SIGKILL)
    mesh.wait_for(r"nats is ready again", since=seen)
    received = [event async for event in events(mesh.url, max_tokens=5)]
    assert received


async def test_a_killed_gateway_keeps_its_port_and_answers_who_connects_meanwhile(mesh: Up) -> None:
    seen, gateway = len(mesh.lines), mesh.pid_of("-m gateway")
    os.kill(gateway, signal.SIGKILL)
    await until(lambda: not is_alive(gateway))
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", int(mesh.url.rpartition(":")[2]))).close()
    async with aiohttp.ClientSession(mesh.url) as http:
        # Not a 503, since it has heard of the others before it answers anybody.
        async with http.post("/v1/completions", json={"model": MODEL, "prompt": "Once", "max_tokens": 2}) as answer:
            assert answer.status == 200, await answer.text()
        mesh.wait_for(r"gateway-0 is ready again", since=seen)


async def test_top_lists_every_instance(mesh: Up) -> None:
    shown = mesh.command("top")
    assert shown.returncode == 0, shown.stderr
    instances = [line.split()[:2] for line in shown.stdout.splitlines()[1:]]
    assert sorted(instances) == [
        [name, "ready"] for name in ("cache-0", "gateway-0", "scheduler-0", "tokenizer-0", "worker-0")
    ]


async def test_drained_worker_ends_and_comes_back(mesh: Up) -> None:
    seen, before = len(mesh.lines), mesh.pid_of("worker_svc")
    drained = mesh.command("drain", "worker-0")
    assert drained.stdout == "worker-0 is draining\nworker-0 has drained\n", drained.stderr
    mesh.wait_for(r"worker-0 is ready again", since=seen)
    assert mesh.pid_of("worker_svc") != before


async def test_drain_of_nobody_says_who_is_there(mesh: Up) -> None:
    refused = mesh.command("drain", "worker-9")
    assert refused.returncode == 2
    assert "no instance 'worker-9'; there is gateway-0, tokenizer-0, scheduler-0, worker-0, cache-0" in refused.stderr


async def test_policies_are_shown_and_switched_for_all_models_and_for_one(mesh: Up) -> None:
    usual = "admit=predicted_reject  order={}  route=least_prefill  predict=bucket\n"
    for words, shown in [
        ([], [("all models", "fcfs")]),
        (["order=srpt", "--model", MODEL], [(MODEL, "srpt")]),
        ([], [("all models", "fcfs"), (MODEL, "srpt")]),
        (["order=fcfs"], [("all models", "fcfs")]),
    ]:
        said = mesh.command("policy", *words)
        assert said.stdout == "".join(f"scheduler-0  {of}  {usual.format(order)}" for of, order in shown), said.stderr


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["order=lifo"], 1, "no order policy 'lifo'; there are fcfs, priority"),
        (["batching=static"], 1, "no policy family 'batching' of schedulers; there are admit, order, route, predict"),
        (["order=fcfs", "--model", "tails"], 2, f"--model: nobody serves 'tails'; there is {MODEL}"),
        (["scale=queue"], 1, "scaling is off: it is switched on at the start, by --scale"),
    ],
)
async def test_policy_that_is_not_there_is_said(mesh: Up, words: list[str], status: int, sentence: str) -> None:
    refused = mesh.command("policy", *words)
    assert (refused.returncode, refused.stdout) == (status, "")
    assert sentence in refused.stderr


async def test_chat_answers_and_keeps_the_conversation(mesh: Up) -> None:
    talk = mesh.command("chat", "--max-tokens", "5", stdin="Hello\n/reset\nTell me a tale\n/nonsense\n/quit\n")
    assert talk.returncode == 0, talk.stderr
    answers = [line for line in talk.stdout.splitlines() if line and "There is /reset" not in line]
    assert len(answers) >= 2
    assert "There is /reset and /quit." in talk.stdout


async def test_interrupt_in_a_chat_stops_the_answer_only(mesh: Up) -> None:
    chat, ours = start_in_terminal(mesh, "chat")
    terminal = Terminal(ours)
    await terminal.see("> ")
    os.write(ours, b"Hello\n")
    await terminal.see(" ", times=5)
    os.write(ours, b"\x03")
    await terminal.see("…\r\n> ")
    os.write(ours, b"\x04")
    assert chat.wait(timeout=20) == 0
    os.close(ours)


async def test_second_mesh_in_the_same_folder_is_refused(mesh: Up) -> None:
    refused = mesh.command("up", "--port", "0")
    assert refused.returncode == 2
    assert f"another `weft up` runs in {mesh.folder}" in refused.stderr and mesh.url in refused.stderr


async def test_interrupt_ends_all_with_status_0(tmp_path: Path) -> None:
    with up.running(tmp_path, "--engine", "null", "--workers", "2") as running:
        children = children_of(running.process.pid)
        assert len(children) == 7
        assert running.interrupt() == 0
    assert not [line for pid, line in children.items() if is_alive(pid)]
    assert "Traceback" not in "\n".join(running.lines)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


async def test_interrupt_lets_running_streams_finish(tmp_path: Path) -> None:
    with up.running(tmp_path, "--engine", "null", "--null-tokens-per-s", "50") as running:
        received = []
        asked = {"max_tokens": 40, "ignore_eos": True, "stream_options": {"include_usage": True}}
        async for event in events(running.url, **asked):
            received.append(event)
            if len(received) == 5:
                running.process.send_signal(signal.SIGINT)
        assert received[-1]["usage"]["completion_tokens"] == 40  # type: ignore[index]  # decoded JSON
        assert running.process.wait(timeout=30) == 0


async def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with up.running(tmp_path, "--engine", "null", "--null-tokens-per-s", "1") as running:
        children = children_of(running.process.pid)
        async for _ in events(running.url, max_tokens=50, ignore_eos=True):
            break
        async with aiohttp.ClientSession() as session:
            stream = await session.post(f"{running.url}/v1/chat/completions", json={**ASKED, "ignore_eos": True})
            running.process.send_signal(signal.SIGINT)
            running.wait_for("press Ctrl-C again")
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(timeout=10) == 130
            stream.close()
    assert not [line for pid, line in children.items() if is_alive(pid)]


async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with up.running(tmp_path, "--engine", "null") as running:
        children = children_of(running.process.pid)
        running.process.kill()
        running.process.wait()
        await until(lambda: not [pid for pid in children if is_alive(pid)])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"num_hidden_layers": 99}, r"weights are missing: model\.layers\."),
    ],
    ids=["unknown architecture", "missing tensor"],
)
async def test_model_that_no_worker_can_run_is_one_sentence(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    source = model_folder.locate("tales-6m")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    whole = json.loads((source / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**whole, **config}))
    running = up.start(tmp_path / "data", "--model", str(broken))
    running.wait_for(rf"^weft up: worker-0: .*{words}")
    assert running.process.wait(timeout=10) == 2
    running.end()
    assert "Traceback" not in "\n".join(running.lines)


async def test_weft_tells_a_tale_with_the_bundled_model(tmp_path: Path) -> None:
    with up.running(tmp_path) as running:
        text = ""
        async for event in events(running.url, max_tokens=40, temperature=0):
            for choice in event["choices"]:  # type: ignore[attr-defined]  # decoded JSON
                text += choice["delta"].get("content") or ""
        assert len(text.split()) > 10
