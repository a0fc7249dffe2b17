"""The tokenizer's shell on a real NATS server, between a gateway and a scheduler played by the test."""

from __future__ import annotations

import asyncio
import json
import shutil
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import nats, ring
from tests.support.wait import until
from tokenizer_svc import encode
from tokenizer_svc.service import PIECE_BYTES, TokenizerService
from weft import model_folder, subjects
from weft.bus import Bus
from weft.columns import pack_u32, unpack_u32
from weft.errors import InvalidRequest, NotFound, SettingsError
from weft.hashing import block_hashes, chain_root
from weft.messages import (
    ChatMessage,
    ChatPrompt,
    Choice,
    Claims,
    DetokenizeQuery,
    DetokenizeReply,
    GenerateRequest,
    ModelCard,
    ModelQuery,
    Prompt,
    SamplingParams,
    StreamEvent,
    TextPrompt,
    TokenizedRequest,
    TokenizeQuery,
    TokenizeReply,
    TokenizerFetch,
    TokenizerPiece,
    TokenPrompt,
)
from weft.model_folder import BUNDLED
from weft.service import Context
from weft.settings import MeshSettings, ModelSettings, TokenizerSettings

MODEL = "tales-1m"
TALES = BUNDLED / MODEL
TOKENIZER = encode.load(TALES)
HI = ChatPrompt([ChatMessage("user", "Tell me a tale")])
EVIL = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nats.running(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


class Neighbours:
    """A gateway and a scheduler; the scheduler listens only when told to."""

    def __init__(self, gateway: Bus, scheduler: Bus) -> None:
        self.gateway = gateway
        self.scheduler = scheduler
        self.events: list[StreamEvent] = []
        self.claims: list[Claims] = []
        self.tokenized: list[TokenizedRequest] = []

    async def start(self) -> None:
        def on_event(message: StreamEvent | Claims) -> None:
            (self.events if isinstance(message, StreamEvent) else self.claims).append(message)  # type: ignore[attr-defined]

        await self.gateway.on(subjects.events("g1"), StreamEvent | Claims, on_event)  # type: ignore[arg-type]  # a union
        await self.gateway.flush()

    async def listen(self) -> None:
        await self.scheduler.on(subjects.SCHEDULE_ALL, TokenizedRequest, self.tokenized.append, queue="scheduler")
        await self.scheduler.flush()

    def generate(self, prompt: Prompt, request_id: str = "r1", model: str = MODEL, **more: Any) -> None:
        choices = more.pop("choices", [Choice(0, 1)])
        sampling = more.pop("sampling", SamplingParams())
        request = GenerateRequest(request_id, 0, "g1", model, prompt, sampling, choices, **more)
        reply = subjects.returned("gateway", "g1", "g1", request_id, 0)
        self.gateway.send(subjects.tokenize(MODEL), request, reply=reply)

    async def rejection(self, request_id: str = "r1") -> tuple[str, str | None, str]:
        def found() -> list[StreamEvent]:
            return [event for event in self.events if event.request_id == request_id]

        await until(found)
        (event,) = found()
        assert (event.kind, event.role, event.instance) == ("rejected", "tokenizer", "t1")
        assert event.error is not None
        return event.error.code, event.error.param, event.error.message


@pytest.fixture
async def near(url: str) -> AsyncIterator[Neighbours]:
    mesh = MeshSettings(nats_url=url)
    gateway, scheduler = Bus(mesh, "gateway", "g1"), Bus(mesh, "scheduler", "s1")
    await gateway.connect()
    await scheduler.connect()
    both = Neighbours(gateway, scheduler)
    await both.start()
    yield both
    await gateway.close()
    await scheduler.close()


@asynccontextmanager
async def tokenizer(url: str, model: ModelSettings | None = None, **more: Any) -> AsyncIterator[TokenizerService]:
    mesh = MeshSettings(nats_url=url, instance="t1", drain_s=5.0)
    settings = TokenizerSettings(mesh=mesh, model=model or ModelSettings(model=MODEL), **more)
    context = Context("tokenizer", mesh)
    service = TokenizerService(settings, context)
    async with ring.running(context, service):
        yield service


def folder_with(tmp_path: Path, **config: Any) -> ModelSettings:
    """The bundled model with another tokenizer_config.json."""
    folder = tmp_path / MODEL
    shutil.copytree(TALES, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelSettings(model=str(folder))


async def test_text_becomes_ids_and_hashes(url: str, near: Neighbours) -> None:
    await near.listen()
    async with tokenizer(url):
        text = "Once upon a time there was a fox who went out to see the world and the moon. " * 3
        emitted = [Choice(0, 1, pack_u32([9, 10])), Choice(1, 2)]
        near.generate(TextPrompt(text), cache_salt="alice", choices=emitted, stamps={"gateway": 1.0})
        await until(lambda: near.tokenized)
        (request,) = near.tokenized
        expected = TOKENIZER.encode(text, add_special_tokens=True)
        digest = model_folder.digest(model_folder.read(ModelSettings(model=MODEL)))
        assert request.prompt_token_ids == expected
        assert request.block_hashes == b"".join(block_hashes(chain_root(digest, "alice"), expected))
        assert request.choices == emitted
        assert set(request.stamps) == {"gateway", "tokenizer"}
        assert near.events == []


async def test_conversation_is_rendered_by_the_models_template(url: str, near: Neighbours) -> None:
    await near.listen()
    async with tokenizer(url):
        near.generate(HI)
        await until(lambda: near.tokenized)
        text = TOKENIZER.decode(near.tokenized[0].prompt_token_ids)
        assert text == "<|bos|><|user|>Tell me a tale<|end|><|assistant|>"


async def test_ids_pass_as_they_are_long_or_short(url: str, near: Neighbours) -> None:
    await near.listen()
    async with tokenizer(url, ModelSettings(model=MODEL)):
        short = pack_u32([1, 2, 3])
        near.generate(TokenPrompt(short), sampling=SamplingParams(max_tokens=2045))
        await until(lambda: near.tokenized)
        assert near.tokenized[0].prompt_token_ids == short


@pytest.mark.parametrize(
    ("prompt", "more", "code", "param", "words"),
    [
        (TextPrompt(""), {}, "invalid_request", "prompt", "empty"),
        (TokenPrompt(b""), {}, "invalid_request", "prompt", "empty"),
        (TokenPrompt(pack_u32([1, 4096])), {}, "invalid_request", "prompt", "token id 4096 at index 1"),
        (TokenPrompt(pack_u32([1] * 2048)), {}, "context_length_exceeded", "prompt", "2049 tokens (2048 in"),
        (TextPrompt("fox " * 4000), {}, "context_length_exceeded", "prompt", "length is 2048 tokens"),
        (TokenPrompt(pack_u32([1] * 100_000)), {}, "context_length_exceeded", "prompt", "100000 in the prompt"),
        (HI, {"sampling": SamplingParams(max_tokens=2048)}, "context_length_exceeded", "messages", "2048 for the"),
        (ChatPrompt([ChatMessage("robot", "hi")]), {}, "invalid_request", "messages", "Unknown role: robot"),
        (HI, {"model": "other"}, "not_found", "model", "other"),
        (HI, {"sampling": SamplingParams(logit_bias={4096: 1.0})}, "invalid_request", "logit_bias", "4096"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:20],
)  # fmt: skip
async def test_bad_prompt_is_rejected_by_its_field(
    url: str, near: Neighbours, prompt: Prompt, more: dict[str, Any], code: str, param: str, words: str
) -> None:
    await near.listen()
    async with tokenizer(url):
        near.generate(prompt, **more)
        found_code, found_param, message = await near.rejection()
        assert (found_code, found_param) == (code, param)
        assert words in message
        assert not near.tokenized


async def test_template_that_never_ends_is_stopped_and_others_go_on(url: str, near: Neighbours, tmp_path: Path) -> None:
    evil = "{% if messages[0].content == 'evil' %}" + EVIL + "{% endif %}{{ messages[0].content }}"
    await near.listen()
    async with tokenizer(url, folder_with(tmp_path, chat_template=evil), template_deadline_s=0.5) as service:
        for number in range(3):
            near.generate(ChatPrompt([ChatMessage("user", "evil")]), f"evil{number}")
        near.generate(HI, "chat")
        near.generate(TextPrompt("a fox"), "text")
        # Both are through before the first of the others is given up.
        await until(lambda: len(near.tokenized) == 2)
        assert near.events == []
        code, param, message = await near.rejection("evil0")
        assert (code, param) == ("invalid_request", "messages")
        assert "longer than 0.5 s" in message
        await until(lambda: service.stats()["render_threads_given_up"] == 0 and service.stats()["held_requests"] == 0)
        assert service.stats()["templates_stopped_total"] == 3
        assert service.is_live()


async def test_held_request_is_claimed_while_it_lasts(url: str, near: Neighbours, tmp_path: Path) -> None:
    await near.listen()
    async with tokenizer(url, folder_with(tmp_path, chat_template=EVIL), template_deadline_s=1.0):
        near.generate(HI)
        await near.rejection()
    assert near.claims
    assert near.claims[0].request_ids == ["r1"]
    assert unpack_u32(near.claims[0].epochs) == [0]
    assert (near.claims[0].role, near.claims[0].instance) == ("tokenizer", "t1")


async def test_long_text_leaves_room_for_short_ones(url: str, near: Neighbours) -> None:
    await near.listen()
    async with tokenizer(url) as service:
        near.generate(TextPrompt("Once upon a time there was a fox. " * 40_000), "long")
        near.generate(TextPrompt("a fox"), "short")
        await until(lambda: near.tokenized)
        assert near.tokenized[0].request_id == "short"
        assert near.events == []
        assert (await near.rejection("long"))[0] == "context_length_exceeded"
        await until(lambda: service.stats()["held_chars"] == 0)


async def test_base_model_has_no_conversations(url: str, near: Neighbours, tmp_path: Path) -> None:
    await near.listen()
    async with tokenizer(url, folder_with(tmp_path)):
        near.generate(HI)
        code, param, message = await near.rejection()
        assert (code, param) == ("invalid_request", "messages")
        assert "has no chat template" in message


async def test_hop_that_no_scheduler_takes_is_told_to_the_gateway(url: str, near: Neighbours) -> None:
    async with tokenizer(url):
        near.generate(TextPrompt("a fox"))
        await until(lambda: near.events)
        (event,) = near.events
        assert (event.request_id, event.kind, event.role) == ("r1", "lost", "tokenizer")
        assert event.error is not None and event.error.code == "unavailable"


async def test_tokenizer_is_served_in_pieces_by_its_digest(url: str, near: Neighbours) -> None:
    async with tokenizer(url):
        subject = subjects.model(MODEL)
        card = await near.gateway.ask(subject, ModelQuery(MODEL), ModelCard, timeout_s=5)
        assert (card.model, card.max_model_len) == (MODEL, 2048)
        packed = b""
        while len(packed) < card.tokenizer_bytes:
            fetch = TokenizerFetch(MODEL, card.tokenizer_digest, len(packed))
            piece = await near.gateway.ask(subject, fetch, TokenizerPiece, timeout_s=5)
            assert piece.offset == len(packed) and 0 < len(piece.data) <= PIECE_BYTES
            packed += piece.data
        assert zlib.decompress(packed) == (TALES / "tokenizer.json").read_bytes()
        with pytest.raises(NotFound):
            await near.gateway.ask(subject, TokenizerFetch(MODEL, b"x" * 16, 0), TokenizerPiece, timeout_s=5)
        with pytest.raises(InvalidRequest):
            await near.gateway.ask(
                subject, TokenizerFetch(MODEL, card.tokenizer_digest, len(packed)), TokenizerPiece, timeout_s=5
            )


async def test_texts_and_ids_can_be_asked_for(url: str, near: Neighbours) -> None:
    async with tokenizer(url):
        subject = subjects.model(MODEL)
        for prompt in (TextPrompt("a fox"), TextPrompt("a fox " * 9000), HI):
            reply = await near.gateway.ask(subject, TokenizeQuery(MODEL, prompt), TokenizeReply, timeout_s=10)
            assert reply.max_model_len == 2048
            back = await near.gateway.ask(
                subject, DetokenizeQuery(MODEL, reply.token_ids), DetokenizeReply, timeout_s=10
            )
            assert (prompt.text if isinstance(prompt, TextPrompt) else "Tell me a tale") in back.text
        with pytest.raises(InvalidRequest, match="token id 5000"):
            await near.gateway.ask(subject, DetokenizeQuery(MODEL, pack_u32([5000])), DetokenizeReply, timeout_s=5)
        with pytest.raises(NotFound):
            await near.gateway.ask(subject, ModelQuery("other"), ModelCard, timeout_s=5)
        with pytest.raises(InvalidRequest, match="Unknown role"):
            robot = ChatPrompt([ChatMessage("robot", "hi")])
            await near.gateway.ask(subject, TokenizeQuery(MODEL, robot), TokenizeReply, timeout_s=5)


async def test_folder_without_a_tokenizer_ends_the_start(url: str, tmp_path: Path) -> None:
    settings = folder_with(tmp_path)
    (Path(settings.model) / "tokenizer.json").unlink()
    with pytest.raises(SettingsError, match=r"has no tokenizer\.json"):
        async with tokenizer(url, settings):
            pass


async def test_drain_finishes_what_came_and_leaves_the_rest_to_others(url: str, near: Neighbours) -> None:
    await near.listen()
    async with tokenizer(url) as first:
        for number in range(200):
            near.generate(HI, f"r{number}")
        await near.gateway.flush()
        await first.drain()
        assert first.stats()["held_requests"] == 0
        await until(lambda: len(near.tokenized) == 200)
        returned: list[object] = []
        await near.gateway.on_returned(lambda hop, error: returned.append(hop))
        await near.gateway.flush()
        near.generate(HI, "late")
        await until(lambda: returned)


async def test_cancelled_drain_hands_on_what_is_held(url: str, near: Neighbours, tmp_path: Path) -> None:
    async with tokenizer(url, folder_with(tmp_path, chat_template=EVIL), template_deadline_s=5.0) as service:
        near.generate(HI)
        await until(lambda: service.stats()["held_requests"] == 1)
        await asyncio.wait_for(service.stop(), 5)
        await until(lambda: [event.kind for event in near.events] == ["lost"])
