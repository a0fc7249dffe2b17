"""The HTTP API of a whole mesh with the bundled model, judged by the official `openai` client and by raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer

from tests.support import up
from tests.support.up import Up
from tests.support.wait import until
from weft.model_folder import BUNDLED

pytestmark = pytest.mark.timeout(120)
MODEL = "tales-6m"
CHAT: list[Any] = [{"role": "user", "content": "Tell me a tale about a fox"}]
PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up.running(tmp_path_factory.mktemp("api"), "--kv-memory", "64MiB") as running:
        yield running


@pytest.fixture
def client(mesh: Up) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(mesh: Up) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mesh.url) as session:
        yield session


# ---- the official client --------------------------------------------------------------------------------------------


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_streamed_chat_equals_the_whole_one(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=40, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("noun", ["fox", "king", "witch"])
def test_a_tale_about_somebody_begins_with_somebody(client: OpenAI, noun: str) -> None:
    request: Any = [{"role": "user", "content": f"Tell me a tale about a {noun}"}]
    answer = client.chat.completions.create(model=MODEL, messages=request, max_tokens=60, temperature=0)
    assert noun in ".".join((answer.choices[0].message.content or "").split(".")[:2]).lower()


async def test_async_client_streams_many_at_once(mesh: Up) -> None:
    async with AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=f"{PROMPT} {number}", max_tokens=20, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(one(number) for number in range(24)))
        alone = [await one(number) for number in (0, 11, 23)]
        assert [together[number] for number in (0, 11, 23)] == alone


def test_several_prompts_and_choices_keep_their_order(client: OpenAI) -> None:
    prompts = ["The king", "The queen", "The fox"]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=8, temperature=0)
    alone = [client.completions.create(model=MODEL, prompt=p, max_tokens=8, temperature=0) for p in prompts]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [a.choices[0].text for a in alone for _ in range(2)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone if a.usage)


def test_token_ids_and_text_are_the_same_prompt(client: OpenAI) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / MODEL / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    by_text = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=12, temperature=0)
    lists = client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text == lists.choices[1].text


def test_seed_decides_a_sampled_answer(client: OpenAI) -> None:
    def text(seed: int) -> str | None:
        answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=30, temperature=1, seed=seed)
        return answer.choices[0].message.content

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_choices_of_one_prompt_differ(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=30, temperature=1.0, n=3, seed=5)
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_stop_strings_end_the_text_and_never_show(client: OpenAI) -> None:
    full = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=60, temperature=0).choices[0].text
    stop = full[20:29]
    for stream in (False, True):
        answer: Any = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=60, temperature=0, stop=[stop, "never said"], stream=stream
        )
        parts = answer if stream else [answer]
        choices = [choice for part in parts for choice in part.choices]
        assert "".join(choice.text for choice in choices) == full[: full.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_echo_begins_with_the_prompt(client: OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0).choices[0].text
    echoed = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + plain


def test_logprobs_name_every_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content
    for token in logprobs.content:
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5)
        assert len(token.top_logprobs) == 3


def test_penalties_bias_and_limits_reach_the_sampler(client: OpenAI) -> None:
    first = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0).choices[0].text
    tokenizer = Tokenizer.from_file(str(BUNDLED / MODEL / "tokenizer.json"))
    banned = tokenizer.encode(first, add_special_tokens=False).ids[0]
    other = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, logit_bias={str(banned): -100}
    )
    assert other.choices[0].text != first
    loop = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=80, temperature=0)
    varied = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=80, temperature=0, frequency_penalty=2, presence_penalty=2
    )
    assert len(set(varied.choices[0].text.split())) > len(set(loop.choices[0].text.split()))
    least = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=50, temperature=0, extra_body={"min_tokens": 50}
    )
    assert least.usage is not None and least.usage.completion_tokens == 50


def test_a_repeated_prompt_is_found_in_the_cache(client: OpenAI) -> None:
    prompt = "There was once a poor woodcutter who lived with his wife and his two children. " * 8
    for cached in (False, True):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert bool(answer.usage.prompt_tokens_details.cached_tokens) == cached


# ---- raw HTTP -------------------------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize_are_inverse(http: aiohttp.ClientSession) -> None:
    async with http.post("/tokenize", json={"model": MODEL, "prompt": PROMPT}) as response:
        tokens = await response.json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] > 0
    async with http.post("/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}) as response:
        assert PROMPT in (await response.json())["prompt"]
    async with http.post("/tokenize", json={"model": MODEL, "messages": CHAT}) as response:
        assert (await response.json())["count"] > tokens["count"]


async def test_health_ready_and_metrics(http: aiohttp.ClientSession) -> None:
    for path in ("/health", "/ready"):
        async with http.get(path) as response:
            assert response.status == 200
    async with http.get("/metrics") as response:
        text = await response.text()
    assert 'weft_requests_total{finish_reason="length",model="tales-6m"}' in text
    assert "weft_time_to_first_token_seconds_bucket" in text


BAD: dict[str, tuple[str, Any, int, str | None]] = {
    "malformed JSON": ("/v1/chat/completions", b'{"model": ', 400, None),
    "invalid UTF-8": ("/v1/completions", b'{"model": "\xff\xfe"}', 400, None),
    "no object": ("/v1/completions", b"[1]", 400, None),
    "deep nesting": ("/v1/completions", b"[" * 100_000, 400, None),
    "NaN": ("/v1/completions", b'{"model":"tales-6m","prompt":"x","temperature":NaN}', 400, None),
    "unknown model": ("/v1/completions", {"model": "gpt-9", "prompt": "x"}, 404, "model"),
    "no model": ("/v1/completions", {"prompt": "x"}, 400, "model"),
    "empty messages": ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    "messages of a wrong type": ("/v1/chat/completions", {"messages": "hello"}, 400, "messages"),
    "negative max_tokens": ("/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    "huge max_tokens": ("/v1/completions", {"prompt": "x", "max_tokens": 10**12}, 400, "max_tokens"),
    "n of a milliard": ("/v1/completions", {"prompt": "x", "n": 10**9}, 400, "n"),
    "10,000 stop strings": ("/v1/completions", {"prompt": "x", "stop": ["a"] * 10_000}, 400, "stop"),
    "temperature as text": ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    "true as a number": ("/v1/completions", {"prompt": "x", "top_p": True}, 400, "top_p"),
    "token ids out of range": ("/v1/completions", {"prompt": [1, 10**6]}, 400, "prompt"),
    "negative token ids": ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    "a prompt of mixed types": ("/v1/completions", {"prompt": ["a", 1]}, 400, "prompt"),
    "a prompt over the context": ("/v1/completions", {"prompt": "word " * 20_000}, 400, "prompt"),
    "an unknown field": ("/v1/completions", {"prompt": "x", "temprature": 1}, 400, "temprature"),
    "tools": ("/v1/chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    "echo with logprobs": ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, 400, "logprobs"),
    "an unknown route": ("/v1/nothing", {}, 404, None),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_a_clear_4xx_that_names_the_field(http: aiohttp.ClientSession, name: str) -> None:
    path, body, status, param = BAD[name]
    if isinstance(body, dict) and name not in ("unknown model", "no model", "an unknown route"):
        body = {"model": MODEL, **body}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(path, data=data, timeout=aiohttp.ClientTimeout(10)) as response:
        answer = await response.json()
    assert response.status == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    if param is not None:
        assert answer["error"]["param"] is not None and answer["error"]["param"].startswith(param), answer
    if name == "a prompt over the context":
        assert "2048" in answer["error"]["message"]
        assert answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_is_not_encoded_as_it_says_is_the_clients_fault(
    http: aiohttp.ClientSession, encoding: str
) -> None:
    data = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    async with http.post("/v1/completions", data=data, headers={"Content-Encoding": encoding}) as response:
        assert response.status == 400
        assert "Content-Encoding" in (await response.json())["error"]["message"]


async def test_a_wrong_method_is_told_the_right_one(http: aiohttp.ClientSession) -> None:
    async with http.put("/v1/completions", json={}) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert set((await response.json())["error"]) == {"message", "type", "param", "code"}


async def test_a_huge_body_is_refused_by_its_announced_size(mesh: Up) -> None:
    host, port = mesh.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n{")
    async with asyncio.timeout(10):
        assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_huge_body_without_a_size_is_refused_where_it_passes_the_limit(http: aiohttp.ClientSession) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(2**20)

    with contextlib.suppress(aiohttp.ClientConnectionError):
        async with http.post("/v1/completions", data=body()) as response:
            assert response.status == 413


async def test_nobody_notices_the_bad_requests_of_others(http: aiohttp.ClientSession) -> None:
    good = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "ignore_eos": True}

    async def text() -> str:
        async with http.post("/v1/completions", json=good) as response:
            return str((await response.json())["choices"][0]["text"])

    alone = await text()
    async with asyncio.TaskGroup() as group:
        texts = [group.create_task(text()) for _ in range(4)]
        for path, body, *_ in BAD.values():
            data = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body}).encode()
            group.create_task(_post(http, path, data))
    assert [task.result() for task in texts] == [alone] * 4


async def _post(http: aiohttp.ClientSession, path: str, data: bytes) -> None:
    async with http.post(path, data=data) as response:
        await response.read()


async def test_an_error_before_the_first_token_is_no_200(http: aiohttp.ClientSession) -> None:
    body = {"model": MODEL, "prompt": "word " * 20_000, "stream": True}
    async with http.post("/v1/completions", json=body) as response:
        assert response.status == 400
        assert response.content_type == "application/json"


def free_blocks(mesh: Up) -> tuple[list[str], list[str]]:
    """(running and waiting, free and all blocks) of the worker, as `weft top` shows them."""
    row = next(line.split() for line in mesh.command("top").stdout.splitlines() if line.startswith("worker-0"))
    return row[3:5], row[5].split("/")


async def test_clients_that_disconnect_free_their_blocks(mesh: Up) -> None:
    host, port = mesh.url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True})
    request = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    writers = []
    for number in range(8):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        await reader.readuntil(b"data: ")
        writers.append(writer)
        if number % 2:
            # The hard way: a reset instead of a goodbye.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    for writer in writers:
        writer.close()
    await until(lambda: free_blocks(mesh)[0] == ["0", "0"], timeout_s=20)
    free, total = free_blocks(mesh)[1]
    assert free == total


async def test_a_reader_that_does_not_read_is_cut_off_and_others_go_on(mesh: Up, http: aiohttp.ClientSession) -> None:
    host, port = mesh.url.removeprefix("http://").split(":")
    # Many long completions in one call, so that the answer outgrows every buffer on the way.
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": PROMPT,
            "n": 32,
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 5,
        }
    )
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    sock.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    with sock:
        good = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
        async with http.post("/v1/completions", json=good) as response:
            assert response.status == 200
        await until(lambda: free_blocks(mesh)[0] == ["0", "0"], timeout_s=60, every_s=0.5)
