"""The bus against a real NATS server, each trap of nats-py and NATS that could lose or hang something included."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support import nats
from tests.support.wait import until
from weft import bus as bus_module
from weft import limits, subjects
from weft.bus import Bus
from weft.errors import DeadlineExceeded, Overloaded, PayloadTooLarge, SettingsError, Unavailable, WeftError
from weft.messages import Control, ControlReply, Heartbeat, Role
from weft.settings import MeshSettings
from weft.subjects import Returned


@pytest.fixture
def server(tmp_path: Path) -> Iterator[nats.NatsServer]:
    with nats.running(tmp_path) as running:
        yield running


@asynccontextmanager
async def connected(url: str, role: Role = "worker", instance: str = "w1", **more: object) -> AsyncIterator[Bus]:
    bus = Bus(MeshSettings(nats_url=url, **more), role, instance)  # type: ignore[arg-type]
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.close()


def beat(number: int) -> Heartbeat:
    return Heartbeat("worker", "w1", number, "ready")


async def test_messages_arrive_in_order(server: nats.NatsServer) -> None:
    async with connected(server.url) as sender, connected(server.url, instance="w2") as receiver:
        got: list[Heartbeat] = []
        await receiver.on(subjects.ALIVE_ALL, Heartbeat, got.append)
        await receiver.flush()
        for number in range(1000):
            sender.send(subjects.alive("worker", "w1"), beat(number))
        await until(lambda: len(got) == 1000)
        assert [message.epoch for message in got] == list(range(1000))


async def test_a_hop_that_nobody_hears_comes_back_to_its_sender(server: nats.NatsServer) -> None:
    async with connected(server.url) as sender:
        returned: list[tuple[Returned, WeftError]] = []
        await sender.on_returned(lambda hop, error: returned.append((hop, error)))
        await sender.flush()
        sender.send("weft.v1.nobody", beat(1), reply=subjects.returned("worker", "w1", "g1", "r1", 3))
        await until(lambda: returned)
        hop, error = returned[0]
        assert hop == Returned("g1", "r1", 3)
        assert isinstance(error, Unavailable)


async def test_no_responders_are_told_only_to_the_publishers_own_subscription(server: nats.NatsServer) -> None:
    # Why every sender of a hop listens for its own returns: a reply subject of the gateway's would stay silent.
    async with connected(server.url, "gateway", "g1") as gateway, connected(server.url, "tokenizer", "t1") as sender:
        at_gateway: list[object] = []
        at_sender: list[object] = []
        await gateway.on_returned(lambda hop, error: at_gateway.append(hop))
        await sender.on_returned(lambda hop, error: at_sender.append(hop))
        await gateway.flush()
        await sender.flush()
        sender.send("weft.v1.nobody", beat(1), reply=subjects.returned("gateway", "g1", "g1", "r1", 1))
        sender.send("weft.v1.nobody", beat(2), reply=subjects.returned("tokenizer", "t1", "g1", "r1", 1))
        await until(lambda: at_sender)
        await gateway.flush()
        assert not at_gateway


async def test_an_undecodable_message_is_counted_and_refused_to_its_sender(server: nats.NatsServer) -> None:
    async with connected(server.url) as sender, connected(server.url, instance="w2") as receiver:
        got: list[Heartbeat] = []
        returned: list[WeftError] = []
        await receiver.on("weft.v1.x", Heartbeat, got.append)
        await sender.on_returned(lambda hop, error: returned.append(error))
        await receiver.flush()
        await sender.flush()
        sender.publish("weft.v1.x", b"\xc1garbage", reply=subjects.returned("worker", "w1", "g1", "r1", 0))
        await until(lambda: returned)
        assert returned[0].code == "decode_error"
        assert receiver.stats.decode_errors == 1
        sender.send("weft.v1.x", beat(1))
        await until(lambda: got)


async def test_a_failing_handler_does_not_end_its_subscription(server: nats.NatsServer) -> None:
    async with connected(server.url) as bus:
        got: list[int] = []

        def handler(message: Heartbeat) -> None:
            if message.epoch == 0:
                raise RuntimeError("first one fails")
            got.append(message.epoch)

        await bus.on("weft.v1.x", Heartbeat, handler)
        await bus.flush()
        bus.send("weft.v1.x", beat(0))
        bus.send("weft.v1.x", beat(1))
        await until(lambda: got)
        assert bus.stats.handler_errors == 1


async def test_ask_gets_the_answer_or_the_other_sides_error(server: nats.NatsServer) -> None:
    async with connected(server.url) as asker, connected(server.url, instance="w2") as answerer:

        async def answer(control: Control) -> ControlReply:
            if control.verb == "stats":
                raise Overloaded("too busy", retry_after_s=2.0)
            return ControlReply("ready")

        await answerer.answer("weft.v1.x", Control, answer)
        await answerer.flush()
        assert await asker.ask("weft.v1.x", Control("drain"), ControlReply, timeout_s=2) == ControlReply("ready")
        with pytest.raises(Overloaded, match="too busy") as caught:
            await asker.ask("weft.v1.x", Control("stats"), ControlReply, timeout_s=2)
        assert caught.value.retry_after_s == 2.0


async def test_ask_without_anyone_there_fails_at_once(server: nats.NatsServer) -> None:
    async with connected(server.url) as asker:
        with pytest.raises(Unavailable, match=r"weft\.v1\.nobody"):
            await asker.ask("weft.v1.nobody", Control("stats"), ControlReply, timeout_s=30)


async def test_ask_without_an_answer_ends_at_its_deadline(server: nats.NatsServer) -> None:
    async with connected(server.url) as asker, connected(server.url, instance="w2") as other:
        await other.on("weft.v1.x", Control, lambda control: None)
        await other.flush()
        with pytest.raises(DeadlineExceeded):
            await asker.ask("weft.v1.x", Control("stats"), ControlReply, timeout_s=0.05)


async def test_a_message_over_the_limit_never_reaches_the_connection(server: nats.NatsServer) -> None:
    async with connected(server.url) as bus:
        with pytest.raises(PayloadTooLarge):
            bus.publish("weft.v1.x", bytes(limits.MAX_MESSAGE_BYTES + 1))
        await bus.flush()


async def test_a_message_of_the_largest_size_passes(server: nats.NatsServer) -> None:
    async with connected(server.url) as bus:
        await bus.on("weft.v1.x", Control, lambda control: None)
        await bus.flush()
        bus.publish("weft.v1.x", bytes(limits.MAX_MESSAGE_BYTES))
        await until(lambda: bus.stats.decode_errors == 1)


async def test_start_gives_up_after_its_deadline_with_one_sentence() -> None:
    bus = Bus(MeshSettings(nats_url="nats://127.0.0.1:1", startup_s=0.2), "worker", "w1")
    with pytest.raises(Unavailable, match=r"no NATS server at nats://127\.0\.0\.1:1 within 0\.2 s"):
        await bus.connect()


async def test_a_server_with_a_small_max_payload_is_refused_at_start(tmp_path: Path) -> None:
    with nats.running(tmp_path, "max_payload: 1MB\n") as server:
        bus = Bus(MeshSettings(nats_url=server.url), "worker", "w1")
        with pytest.raises(SettingsError, match="max_payload"):
            await bus.connect()
        await bus.close()


# ---- the traps of nats-py: each has bitten someone ------------------------------------------------------------------


async def test_messages_sent_while_nats_is_down_arrive_when_it_is_back(server: nats.NatsServer, tmp_path: Path) -> None:
    async with connected(server.url) as sender, connected(server.url, instance="w2") as receiver:
        got: list[int] = []
        back: list[str] = []
        await receiver.on("weft.v1.x", Heartbeat, lambda message: got.append(message.epoch))
        sender.on_reconnect.append(lambda: back.append("sender"))
        receiver.on_reconnect.append(lambda: back.append("receiver"))
        await receiver.flush()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        await until(lambda: not sender.connected and not receiver.connected)
        again = nats.start(port=server.port, folder=tmp_path)
        try:
            await until(lambda: "receiver" in back)
            for number in range(10):
                sender.send("weft.v1.x", beat(number))
            await until(lambda: len(back) == 2 and len(got) == 10)
        finally:
            nats.stop(again)
    assert got == list(range(10))


async def test_dropped_messages_are_counted(server: nats.NatsServer) -> None:
    async with connected(server.url) as sender, connected(server.url, instance="w2") as receiver:
        await receiver.on("weft.v1.x", Heartbeat, lambda message: None, max_pending=10)
        await receiver.flush()
        for number in range(200):
            sender.send("weft.v1.x", beat(number))
        await until(lambda: receiver.stats.slow_consumer > 0)


async def test_a_stalled_server_neither_blocks_senders_nor_the_end(
    server: nats.NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nats-py's publish swallows cancellation when its buffer is full: a sender must never be in it.
    monkeypatch.setattr(bus_module, "MAX_QUEUED_BYTES", 8 * 2**20)
    bus = Bus(MeshSettings(nats_url=server.url), "worker", "w1")
    await bus.connect()
    server.process.send_signal(signal.SIGSTOP)
    try:
        refused = 0
        for _ in range(64):
            try:
                bus.publish("weft.v1.x", bytes(2**20))
            except Overloaded:
                refused += 1
            await asyncio.sleep(0)
        assert refused > 0
        assert bus.stats.refused_full == refused
        started = time.monotonic()
        async with asyncio.timeout(20):
            await bus.close()
        assert time.monotonic() - started < 15
    finally:
        server.process.send_signal(signal.SIGCONT)


async def test_a_denied_subject_is_an_error_at_start(tmp_path: Path) -> None:
    config = """max_payload: 8MB
authorization { users: [
  {user: worker, password: pw, permissions: {publish: ["ok.>"], subscribe: ["ok.>", "_INBOX.worker.>"]}}
] }
"""
    with nats.running(tmp_path, config) as server:
        async with connected(server.url, nats_user="worker", nats_password="pw") as bus:
            await bus.on("ok.x", Heartbeat, lambda message: None)
            await bus.flush()
            await bus.on("forbidden.x", Heartbeat, lambda message: None)
            with pytest.raises(SettingsError, match=r"forbidden\.x"):
                await bus.flush()


async def test_a_wrong_password_is_refused_with_one_sentence(tmp_path: Path) -> None:
    config = "max_payload: 8MB\nauthorization { users: [{user: worker, password: pw}] }\n"
    with nats.running(tmp_path, config) as server:
        settings = MeshSettings(nats_url=server.url, nats_user="worker", nats_password="no", startup_s=1.0)
        bus = Bus(settings, "worker", "w1")
        with pytest.raises((SettingsError, Unavailable)):
            await bus.connect()


async def test_a_connection_that_nats_py_gave_up_is_reported(tmp_path: Path) -> None:
    with nats.running(tmp_path, "max_payload: 8MB\nmax_subs: 1\n") as server:
        async with connected(server.url) as bus:
            closed: list[bool] = []
            bus.on_closed.append(lambda: closed.append(True))
            await bus.on("weft.v1.x", Heartbeat, lambda message: None)
            await bus.on("weft.v1.y", Heartbeat, lambda message: None)
            await until(lambda: closed)
