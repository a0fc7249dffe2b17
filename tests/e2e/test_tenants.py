"""Tenants and service classes over HTTP, on a whole mesh, judged by the official `openai` client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support import up
from tests.support.up import Up

pytestmark = pytest.mark.timeout(120)
MODEL = "tales-6m"
CHAT: list[Any] = [{"role": "user", "content": "Tell me a tale about a fox"}]
NAMES = ("metered", "crowded", "premium", "heavy", "other")
TENANTS = """\
metered  tokens_per_minute=60 burst=100
crowded  tokens_per_minute=60 burst=100
premium  class=priority
heavy    weight=4
"""


def write_files(folder: Path) -> list[str]:
    keys, tenants = folder / "keys", folder / "tenants"
    keys.write_text("".join(f"{n}:{sha256(n.encode()).hexdigest()}\n" for n in NAMES))
    tenants.write_text(TENANTS)
    return ["--api-keys-file", str(keys), "--tenants-file", str(tenants)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("tenants")
    # What nobody can keep, of one class: whoever is of it hears that as soon as a prefill was measured.
    policies = ["--admit", "early_reject", "--order", "fair", "--slo", "priority:ttft=0.000001"]
    with up.running(folder, "--kv-memory", "64MiB", "--max-num-seqs", "2", *policies, *write_files(folder)) as running:
        yield running


def client_of(mesh: Up, key: str) -> OpenAI:
    return OpenAI(base_url=f"{mesh.url}/v1", api_key=key, max_retries=0)


def test_an_answer_says_which_tier_it_had(mesh: Up) -> None:
    with client_of(mesh, "other") as client:
        for asked, served in (("flex", "flex"), ("auto", "default"), ("priority", "default")):
            tier: Any = asked
            whole = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4, service_tier=tier)
            stream = client.chat.completions.create(
                model=MODEL, messages=CHAT, max_tokens=4, service_tier=tier, stream=True
            )
            assert {whole.service_tier, *(chunk.service_tier for chunk in stream)} == {served}
        assert client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4).service_tier is None


def test_a_tenant_cannot_ask_for_a_priority_above_its_own(mesh: Up) -> None:
    with client_of(mesh, "other") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="a", extra_body={"priority": -1})
        assert caught.value.param == "priority"
        client.completions.create(model=MODEL, prompt="a", max_tokens=1, extra_body={"priority": 1})


def test_a_quota_is_kept_and_says_when_there_is_more(mesh: Up) -> None:
    with client_of(mesh, "metered") as client:
        first = client.completions.with_raw_response.create(model=MODEL, prompt="Once upon", max_tokens=60)
        assert first.headers["x-ratelimit-limit-tokens"] == "100"
        assert first.parse().usage is not None
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(100):
                client.completions.create(
                    model=MODEL, prompt="Once upon", max_tokens=60, extra_body={"ignore_eos": True}
                )
    error = caught.value
    assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
    # A token a second, and no more than 63 are asked for.
    assert 1 <= int(error.response.headers["Retry-After"]) <= 63
    assert int(error.response.headers["x-ratelimit-remaining-tokens"]) < 63


async def test_what_running_calls_may_come_to_is_taken_from_the_quota_at_once(mesh: Up) -> None:
    async with AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="crowded", max_retries=0) as client:
        call = client.completions.create
        calls = [call(model=MODEL, prompt="Once", max_tokens=95, extra_body={"ignore_eos": True}) for _ in range(8)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, openai.RateLimitError) for answer in answers) == 7


def test_a_quota_of_one_tenant_is_nothing_to_another(mesh: Up) -> None:
    with client_of(mesh, "other") as client:
        answer = client.completions.with_raw_response.create(model=MODEL, prompt="Once", max_tokens=200)
    assert answer.parse().usage is not None
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_what_admission_refuses_comes_with_a_time_to_come_back(mesh: Up) -> None:
    with client_of(mesh, "premium") as client, pytest.raises(openai.RateLimitError) as caught:
        # Until a worker has told how fast it is.
        for _ in range(1000):
            client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1)
    assert caught.value.code == "overloaded"
    assert "a first token is expected in" in caught.value.message
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
    with client_of(mesh, "premium") as client:
        client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=1, service_tier="default")


async def test_a_tenant_of_more_weight_is_served_more(mesh: Up) -> None:
    ended: list[str] = []

    async def one(client: AsyncOpenAI, tenant: str) -> None:
        await client.completions.create(model=MODEL, prompt="Once", max_tokens=32, extra_body={"ignore_eos": True})
        ended.append(tenant)

    def connect(tenant: str) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key=tenant, max_retries=0)

    async with connect("other") as other, connect("heavy") as heavy:
        # The lighter one comes first.
        await asyncio.gather(*(one(other, "other") for _ in range(20)), *(one(heavy, "heavy") for _ in range(20)))
    # Equal weights give 10, and 4 to 1 about 16.
    assert ended[:20].count("heavy") >= 13


def test_a_bad_file_or_objective_is_said_and_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text("acme weight=heavy\n")
    (tmp_path / "cost").write_text('{"what": "mine"}\n')
    for argv, sentence in (
        (["--tenants-file", str(tmp_path / "tenants")], "line 1: weight: 'heavy' is no number above 0"),
        (["--cost-file", str(tmp_path / "cost")], "missing required field `cost`"),
        (["--scale", "slo", "--slo", "tbt=0.1"], "slo needs the promise of a first token"),
        (["--slo", "ttft=soon"], "'soon' is no number of seconds above 0"),
    ):
        failed = up.start(tmp_path, *argv)
        try:
            failed.wait_for(sentence)
            assert failed.process.wait(timeout=60) == 2
        finally:
            failed.end()
