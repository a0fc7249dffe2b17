"""The bus: typed messages over NATS.

Everything sent goes through one writer task behind a bounded queue, because nats-py's `publish` swallows
cancellation while its buffer is full: nothing else in a service ever waits on the connection. Handlers are plain
functions, called in order, which must not block; what a handler cannot do at once it gives to a task of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from weft import codec, limits, subjects
from weft.errors import (
    DeadlineExceeded,
    DecodeError,
    Overloaded,
    PayloadTooLarge,
    SettingsError,
    Unavailable,
    WeftError,
)
from weft.messages import ErrorInfo, Message, Refused, Role
from weft.settings import MeshSettings
from weft.subjects import Returned

log = logging.getLogger(__name__)
M = TypeVar("M")

MAX_QUEUED_BYTES: Final = 64 * 2**20
MAX_QUEUED_MESSAGES: Final = 65_536
RECONNECT_WAIT_S: Final = 0.2
CLOSE_S: Final = 1.0


@dataclass(slots=True)
class BusStats:
    """Counters since start."""

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    refused_full: int = 0
    decode_errors: int = 0
    handler_errors: int = 0
    slow_consumer: int = 0
    permission_denied: int = 0
    disconnects: int = 0


class Bus:
    """One service's connection to NATS."""

    def __init__(self, settings: MeshSettings, role: Role, instance: str) -> None:
        self.role: Role = role
        self.instance = instance
        self.stats = BusStats()
        # Called after every reconnect: messages may have been lost, and subscriptions are back.
        self.on_reconnect: list[Callable[[], None]] = []
        # Called when nats-py gave up the connection for good, as it does on any error but a permission's.
        self.on_closed: list[Callable[[], None]] = []
        self._settings = settings
        self._client = Client()
        self._queue: deque[tuple[str, bytes, str]] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._subscriptions: dict[str, Subscription] = {}
        self._denied: list[str] = []
        self._closing = False

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    async def connect(self) -> None:
        """Connect, and reconnect for ever after.

        Raises:
            Unavailable: no server answered within `startup_s`.
            SettingsError: the server refused the user, or its max_payload is smaller than ours.
        """
        user = self._settings.nats_user
        try:
            # nats-py itself would retry the first connection for ever, without a word.
            async with asyncio.timeout(self._settings.startup_s):
                await self._client.connect(
                    servers=[url.strip() for url in self._settings.nats_url.split(",")],
                    name=f"{self.role}.{self.instance}",
                    inbox_prefix=f"_INBOX.{self.role}.{self.instance}",
                    user=user or None,
                    password=self._settings.nats_password if user else None,
                    connect_timeout=2,
                    reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # seconds; annotated int, used as float
                    max_reconnect_attempts=-1,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnect,
                    reconnected_cb=self._on_reconnected,
                    closed_cb=self._on_closed,
                )
        except TimeoutError:
            # A wrong password looks the same from here: nats-py tries again and again.
            last = f", last answer: {self._client.last_error}" if self._client.last_error else ""
            raise Unavailable(
                f"no NATS server at {self._settings.nats_url} within {self._settings.startup_s:g} s{last}"
            ) from None
        except nats.errors.Error as error:
            raise SettingsError(f"NATS at {self._settings.nats_url} refused {self.role}: {error}") from error
        if self._client.max_payload < limits.MAX_MESSAGE_BYTES:
            raise SettingsError(
                f"NATS at {self._settings.nats_url} has max_payload {self._client.max_payload}; "
                f"Weft needs {limits.MAX_MESSAGE_BYTES} (see weft/nats.conf)"
            )
        self._writer = asyncio.create_task(self._write(), name="bus writer")

    def send(self, subject: str, message: Message, *, reply: str = "") -> None:
        """Queue a message; it leaves with the next turn of the loop. Never waits.

        Raises:
            PayloadTooLarge: larger than the bus carries.
            Overloaded: the queue is full, since NATS is away or slow.
        """
        self.publish(subject, codec.encode(message), reply=reply)

    def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """`send` for bytes that are encoded already."""
        if len(data) > limits.MAX_MESSAGE_BYTES:
            raise PayloadTooLarge(f"{len(data)} bytes are over the limit of {limits.MAX_MESSAGE_BYTES}")
        if len(self._queue) >= MAX_QUEUED_MESSAGES or self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            self.stats.refused_full += 1
            raise Overloaded("the bus is not taking messages", retry_after_s=1.0)
        self._queue.append((subject, data, reply))
        self._queued_bytes += len(data)
        self._wake.set()

    def tell(self, subject: str, message: Message, *, reply: str = "") -> None:
        """`send` for what is as good as lost on the way if the bus does not take it: somebody else notices."""
        try:
            self.send(subject, message, reply=reply)
        except Overloaded:
            # Counted by `publish`. A line for each would be many while NATS is away.
            log.debug("message not sent", extra={"subject": subject})
        except PayloadTooLarge as error:
            log.error("message not sent", extra={"subject": subject, "error": error.message})

    async def on(
        self,
        subject: str,
        expected: type[M],
        handler: Callable[[M], None],
        *,
        queue: str = "",
        max_pending: int = MAX_QUEUED_MESSAGES,
    ) -> None:
        """Call `handler` for every message on `subject`. What is no `expected` is counted, and refused if it can be.

        Over `max_pending` unhandled messages nats-py drops the newest, which `stats.slow_consumer` counts.
        """

        async def receive(msg: Msg) -> None:
            message = self._decode(msg, expected)
            if message is not None:
                self._guard(handler, message)

        self._subscriptions[subject] = await self._client.subscribe(
            subject, queue=queue, cb=receive, pending_msgs_limit=max_pending
        )

    async def leave(self, subject: str) -> None:
        """Take nothing more from a subject given to `on`; returns when what had arrived has been handled.

        A member of a queue group that drains begins with this: what is sent from now on goes to the others.
        """
        subscription = self._subscriptions.pop(subject, None)
        if subscription is not None and self.connected:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self._client._send_unsubscribe(subscription._id)
                # As in `flush`: nats-py's own drain would stop listening before the server has heard of it.
                await self._client.flush(timeout=5)
                await self._client.flush(timeout=5)
                await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py's is

    async def on_returned(self, handler: Callable[[Returned, WeftError], None]) -> None:
        """Call `handler` for every hop of ours that came back: nobody listened, or it was refused."""

        async def receive(msg: Msg) -> None:
            self.stats.received += 1
            try:
                returned = subjects.parse_returned(msg.subject)
                error = (
                    Unavailable(f"nobody listens on {msg.headers.get('Nats-Subject', 'its subject')}")
                    if msg.headers and msg.headers.get("Status") == "503"
                    else codec.decode(msg.data, Refused).error.to_error()
                )
            except (DecodeError, ValueError):
                self.stats.decode_errors += 1
                return
            self._guard(lambda pair: handler(*pair), (returned, error))

        await self._client.subscribe(subjects.returned_all(self.role, self.instance), cb=receive)

    async def answer(
        self, subject: str, expected: type[M], handler: Callable[[M], Awaitable[Message]], *, queue: str = ""
    ) -> None:
        """Answer requests on `subject`; a `WeftError` from the handler is answered as `Refused`."""
        running: set[asyncio.Task[None]] = set()

        async def reply(message: M, to: str) -> None:
            try:
                answer: Message = await handler(message)
            except WeftError as error:
                answer = Refused(ErrorInfo.of(error))
            except Exception:
                self.stats.handler_errors += 1
                log.exception("request handler failed", extra={"subject": subject})
                answer = Refused(ErrorInfo("internal_error", "the service failed to answer"))
            self.tell(to, answer)

        async def receive(msg: Msg) -> None:
            message = self._decode(msg, expected)
            if message is not None and msg.reply:
                task = asyncio.create_task(reply(message, msg.reply))
                running.add(task)
                task.add_done_callback(running.discard)

        await self._client.subscribe(subject, queue=queue, cb=receive)

    async def ask(self, subject: str, message: Message, expected: type[M], *, timeout_s: float) -> M:
        """Send a request and wait for its answer.

        Raises:
            Unavailable: nobody listens there, or NATS is away.
            DeadlineExceeded: no answer in time.
            DecodeError: the answer is no `expected`.
            WeftError: what the other side answered, if it refused.
        """
        data = codec.encode(message)
        if not self.connected or self._client.pending_data_size + len(data) > MAX_QUEUED_BYTES:
            raise Unavailable("NATS is away")
        try:
            msg = await self._client.request(subject, data, timeout=timeout_s)
        except nats.errors.NoRespondersError:
            raise Unavailable(f"nobody answers on {subject}") from None
        except (nats.errors.TimeoutError, TimeoutError):
            raise DeadlineExceeded(f"no answer on {subject} within {timeout_s:g} s") from None
        except nats.errors.Error as error:
            raise Unavailable(f"NATS: {error}") from error
        self.stats.received += 1
        try:
            return codec.decode(msg.data, expected)
        except DecodeError:
            try:
                refused = codec.decode(msg.data, Refused)
            except DecodeError:
                self.stats.decode_errors += 1
            else:
                raise refused.error.to_error() from None
            raise

    async def flush(self) -> None:
        """Wait until the server has seen all that was sent.

        Raises:
            SettingsError: it denied something; NATS says so only afterwards, and to nobody in particular.
            Unavailable: it did not answer.
        """
        await self._until_written()
        try:
            # nats-py 2.16 writes the PING ahead of what its buffer still holds: only the second one follows it.
            await self._client.flush(timeout=5)
            await self._client.flush(timeout=5)
        except (nats.errors.Error, TimeoutError) as error:
            raise Unavailable(f"NATS did not answer: {error}") from error
        if self._denied:
            raise SettingsError(f"NATS denies {self.role}: {'; '.join(self._denied)}")

    async def close(self) -> None:
        """Send what is queued, if the server takes it within a second, and disconnect; a server that hangs is left."""
        self._closing = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.flush()
        except (WeftError, TimeoutError):
            log.warning("closed with messages unsent", extra={"messages": len(self._queue)})
        self._queue.clear()
        if self._writer:
            self._writer.cancel()
        closing = asyncio.create_task(self._client.close(), name="bus close")
        done, _ = await asyncio.wait({closing}, timeout=CLOSE_S)
        if not done:
            # nats-py waits for its last bytes to leave, cancelled or not, and they never will.
            writer = getattr(self._client._transport, "_io_writer", None)
            if writer is not None:
                writer.transport.abort()
            await asyncio.wait({closing}, timeout=CLOSE_S)

    async def _until_written(self) -> None:
        while self._queue and self.connected:
            self._drained.clear()
            await self._drained.wait()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                subject, data, reply = self._queue.popleft()
                self._queued_bytes -= len(data)
                try:
                    await self._client.publish(subject, data, reply=reply)
                except nats.errors.Error as error:
                    log.error("publish failed", extra={"subject": subject, "error": str(error)})
                    continue
                self.stats.sent += 1
                self.stats.sent_bytes += len(data)
            self._drained.set()

    def _decode(self, msg: Msg, expected: type[M]) -> M | None:
        self.stats.received += 1
        try:
            return codec.decode(msg.data, expected)
        except DecodeError as error:
            self.stats.decode_errors += 1
            log.warning("undecodable message", extra={"subject": msg.subject, "error": error.message})
            if msg.reply:
                self.tell(msg.reply, Refused(ErrorInfo.of(error)))
            return None

    def _guard(self, handler: Callable[[M], None], message: M) -> None:
        try:
            handler(message)
        except Exception:
            # One bad message must not end the subscription, which would be silent.
            self.stats.handler_errors += 1
            log.exception("message handler failed", extra={"message_type": type(message).__name__})

    async def _on_error(self, error: Exception) -> None:
        # Awaited inside nats-py's read loop: must not wait for anything.
        if isinstance(error, nats.errors.SlowConsumerError):
            self.stats.slow_consumer += 1
        elif "permissions violation" in str(error).lower():
            self.stats.permission_denied += 1
            self._denied.append(str(error))
            log.error("NATS denied a subject", extra={"error": str(error)})
        else:
            log.debug("NATS error", extra={"error": repr(error)})

    async def _on_disconnect(self) -> None:
        if not self._closing:
            self.stats.disconnects += 1
            log.warning("NATS connection lost")

    async def _on_reconnected(self) -> None:
        log.warning("NATS connection restored")
        for callback in self.on_reconnect:
            callback()

    async def _on_closed(self) -> None:
        if not self._closing:
            log.error("NATS connection closed for good")
            for callback in self.on_closed:
                callback()
