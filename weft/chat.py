"""`weft chat`: a conversation with a running mesh, over its HTTP interface like any other client.

Ctrl-C stops an answer, not the program; Ctrl-D or /quit ends; /reset begins a new conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from weft import data_folder
from weft.errors import NotFound, SettingsError, Unavailable, WeftError
from weft.exit_status import complain
from weft.settings import ChatSettings, load

DEFAULT_URL: Final = "http://localhost:8000"
# An answer may take long to begin and to end, so only silence is bounded.
TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=300)


def main(argv: Sequence[str]) -> int:
    try:
        settings = load(ChatSettings, argv, os.environ, prog="weft chat")
        with asyncio.Runner() as runner:
            return _converse(settings, runner)
    except WeftError as error:
        return complain("weft chat", error)


class Client:
    """The calls that a terminal makes."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def models(self) -> list[str]:
        """Names of the models served. Raises WeftError."""
        async with self._session() as session, self._errors(), session.get(f"{self.url}/v1/models") as response:
            await _check(response)
            return [str(entry["id"]) for entry in (await response.json())["data"]]

    async def answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Pieces of the answer as they come. Raises WeftError."""
        async with (
            self._session() as session,
            self._errors(),
            session.post(f"{self.url}/v1/chat/completions", json={**body, "stream": True}) as response,
        ):
            await _check(response)
            async for line in response.content:
                field, _, data = line.decode().strip().partition(": ")
                if field != "data" or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise Unavailable(str(event["error"].get("message", event["error"])))
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    async def explanation(self, asked: str) -> dict[str, Any]:
        """What became of a request. Raises WeftError."""
        url = f"{self.url}/v1/requests/{quote(asked, safe='')}/explain"
        async with self._session() as session, self._errors(), session.get(url) as response:
            await _check(response)
            return dict(await response.json())

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers=self._headers, timeout=TIMEOUT)

    @contextlib.asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except aiohttp.InvalidURL:
            raise SettingsError(f"--url: {self.url!r} is no address such as {DEFAULT_URL}") from None
        except aiohttp.ClientConnectorError:
            raise Unavailable(f"nothing listens at {self.url}; `weft up` starts Weft, --url says where else") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{self.url} broke off: {str(error) or type(error).__name__}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{self.url} does not speak the OpenAI API: {error!r}") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raise the error that the gateway sent, if it did."""
    if response.status == 200:
        return
    text = await response.text()
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:200] or str(response.reason)
    raise (NotFound if response.status == 404 else Unavailable)(f"{message} (HTTP {response.status})")


def _converse(settings: ChatSettings, runner: asyncio.Runner) -> int:
    client = Client(settings.url or url_here(settings.data_path), settings.api_key)
    model = _choose(settings.model, runner.run(client.models()))
    beginning = [{"role": "system", "content": settings.system}] if settings.system else []
    messages = list(beginning)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Arrow keys and history in input().
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        _say(f"This is {model} at {client.url}. /reset begins anew, /quit ends, Ctrl-C stops an answer.\n")
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
        except EOFError:
            _say("\n" if is_terminal else "")
            return 0
        except KeyboardInterrupt:
            _say("\n")
            continue
        if text == "/quit":
            return 0
        if text == "/reset":
            messages = list(beginning)
            continue
        if not text:
            continue
        if text.startswith("/"):
            _say("There is /reset and /quit.\n")
            continue
        messages.append({"role": "user", "content": text})
        answer = _answer(client, runner, _body(settings, model, messages))
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()


def _answer(client: Client, runner: asyncio.Runner, body: dict[str, Any]) -> str:
    """Show an answer as it comes; what there is of it is returned even if it was stopped or broke off."""
    pieces: list[str] = []

    async def show() -> None:
        async for piece in client.answer(body):
            pieces.append(piece)
            _say(piece)

    try:
        runner.run(show())
    except KeyboardInterrupt:
        _say(" …")
    except WeftError as error:
        _say(f"\n[{error.message}]" if pieces else f"[{error.message}]")
    _say("\n")
    return "".join(pieces)


def _body(settings: ChatSettings, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    wanted = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    return {"model": model, "messages": messages, **{k: v for k, v in wanted.items() if v is not None}}


def _choose(wanted: str, served: list[str]) -> str:
    if not served:
        raise Unavailable("the gateway serves no model yet")
    # WEFT_MODEL may hold the folder that `weft up` was given.
    for name in (wanted, wanted.rstrip("/").rpartition("/")[2]):
        if name in served:
            return name
    if wanted:
        raise SettingsError(f"--model: no model {wanted!r} is served; there is {', '.join(served)}")
    return served[0]


def url_here(data_path: str) -> str:
    """Address of the `weft up` that runs on this machine, or the usual one."""
    run_file = data_folder.read_run_file(data_folder.at(data_path))
    return run_file.url if run_file else DEFAULT_URL


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
