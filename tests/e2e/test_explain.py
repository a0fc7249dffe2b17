"""Explanations from a whole mesh: over HTTP with API keys, and in the terminal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from tests.support import up
from tests.support.up import Up

pytestmark = pytest.mark.timeout(120)
MODEL = "tales-6m"
KEYS = {"alice": "key-a", "bob": "key-b"}
LONG = "Once upon a time there was a fox who lived in a forest. " * 40


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("explain")
    lines = [f"{tenant}:{hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in KEYS.items()]
    (folder / "keys").write_text("\n".join(lines))
    with up.running(folder, "--kv-memory", "64MiB", "--api-keys-file", str(folder / "keys")) as running:
        yield running


@pytest.fixture
async def http(mesh: Up) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mesh.url, headers={"Authorization": f"Bearer {KEYS['alice']}"}) as session:
        yield session


async def complete(http: aiohttp.ClientSession, prompt: Any, **more: object) -> dict[str, Any]:
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 4, **more}
    async with http.post("/v1/completions", json=asked) as response:
        return dict(await response.json())


async def explained(http: aiohttp.ClientSession, asked: str) -> list[dict[str, Any]]:
    """The time lines, once the decisions have come, which is a little later than the tokens."""
    async with asyncio.timeout(20):
        while True:
            async with http.get(f"/v1/requests/{asked}/explain") as response:
                assert response.status == 200, await response.text()
                requests: list[dict[str, Any]] = (await response.json())["requests"]
            if all(request["why"] for request in requests):
                return requests


async def test_answer_leads_to_the_time_lines_of_all_its_prompts(http: aiohttp.ClientSession) -> None:
    answer = await complete(http, [LONG, "The king"])
    long, short = await explained(http, answer["id"])
    events = [entry["event"] for entry in long["timeline"]]
    # 256 tokens a step: the prompt takes several.
    assert events == ["received", "tokenized", "scheduled", "started", "prefill", "first_token", "done"]
    times = [entry["at_s"] for entry in long["timeline"]]
    assert times == sorted(times)
    assert [entry["event"] for entry in short["timeline"]] == [event for event in events if event != "prefill"]
    assert short["why"].startswith("worker-0: least_prefill, shortest queue; ")
    assert long["timeline"][2]["decision"]["scores"][0]["worker"] == "worker-0"


async def test_second_prompt_alike_is_placed_by_its_prefix(http: aiohttp.ClientSession) -> None:
    await complete(http, LONG)
    answer = await complete(http, LONG)
    (request,) = await explained(http, answer["id"])
    assert "longest match: holds " in request["why"]
    started = next(entry for entry in request["timeline"] if entry["event"] == "started")
    assert started["num_cached_tokens"] > started["num_prompt_tokens"] / 2


async def test_stream_says_its_id_at_once_and_its_time_line_while_it_runs(http: aiohttp.ClientSession) -> None:
    asked = {"model": MODEL, "prompt": "The fox", "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with http.post("/v1/completions", json=asked) as response:
        (request,) = await explained(http, response.headers["X-Request-Id"])
        assert request["timeline"][-1]["event"] != "dropped"
        name = response.headers["X-Request-Id"]
    async with asyncio.timeout(20):
        while (await explained(http, name))[0]["state"] != "dropped":
            pass


async def test_nobody_else_sees_it(mesh: Up, http: aiohttp.ClientSession) -> None:
    answer = await complete(http, "The queen")
    path = f"/v1/requests/{answer['id']}/explain"
    for headers, status in (({"Authorization": f"Bearer {KEYS['bob']}"}, 404), ({"Authorization": ""}, 401)):
        async with http.get(path, headers=headers) as response:
            assert response.status == status
    async with http.get("/v1/requests/cmpl-0/explain") as response:
        assert response.status == 404
        assert "no request 'cmpl-0' is known here" in json.loads(await response.text())["error"]["message"]


def explain_in_terminal(mesh: Up, asked: str) -> subprocess.CompletedProcess[str]:
    environ = up.environ(mesh.folder) | {"WEFT_API_KEY": KEYS["alice"]}
    return subprocess.run(
        [up.WEFT, "explain", asked], env=environ, capture_output=True, text=True, timeout=60, check=False
    )


async def test_error_leads_to_its_time_line(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/completions", json={"model": MODEL, "prompt": LONG * 20}) as response:
        assert response.status == 400
        asked = response.headers["X-Request-Id"]
        message = (await response.json())["error"]["message"]
    async with http.get(f"/v1/requests/{asked}/explain") as response:
        (request,) = (await response.json())["requests"]
    assert (request["state"], request["why"]) == ("failed", "")
    assert request["timeline"][-1]["text"] == message


async def test_terminal_shows_it(mesh: Up, http: aiohttp.ClientSession) -> None:
    answer = await complete(http, "The witch")
    await explained(http, answer["id"])
    shown = await asyncio.to_thread(explain_in_terminal, mesh, answer["id"])
    assert shown.returncode == 0, shown.stderr
    assert "first token  from worker-0" in shown.stdout
    assert "done: placed on worker-0: least_prefill" in shown.stdout
    unknown = await asyncio.to_thread(explain_in_terminal, mesh, "cmpl-0")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("weft explain: no request 'cmpl-0' is known here")
