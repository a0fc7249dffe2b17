"""A gateway's request table in a world that a test plays: workers' frames, news, and a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.assembler import Delta
from gateway.streams import Patience, Request, RequestTable, Stream
from weft import messages as m
from weft.columns import pack_u32
from weft.errors import WeftError


@dataclass
class PlainAssembler:
    """Tokens as they come; token 0 stands for a stop string that only the gateway sees."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def num_counted(self) -> int:
        return len(self.token_ids)

    def push(self, token_ids: Sequence[int], finish: int, logprobs: object = ()) -> Delta:
        self.token_ids += token_ids
        if 0 in token_ids:
            self.finish_reason = "stop"
        elif finish:
            self.finish_reason = "length"
        return Delta(" ".join(map(str, token_ids)), self.finish_reason)


@dataclass
class Reader:
    deltas: dict[int, list[str]] = field(default_factory=dict)
    errors: list[WeftError] = field(default_factory=list)
    ended: int = 0

    def on_delta(self, stream: Stream, delta: Delta) -> None:
        self.deltas.setdefault(stream.index, []).extend(delta.text.split())

    def on_failed(self, request: Request, error: WeftError) -> None:
        self.errors.append(error)

    def on_ended(self, request: Request) -> None:
        self.ended += 1


class World:
    """A table, what it sent, and a clock."""

    def __init__(self, num_choices: int = 1, wait_for_role_s: float = 10.0) -> None:
        self.sent: list[m.GenerateRequest | m.Cancel] = []
        self.table = RequestTable("g1", Patience(wait_for_role_s, 60.0), self.sent.append, lambda: 0.5)
        self.now = 0.0
        self.reader = Reader()
        self.sequence = 0
        message = m.GenerateRequest("r1", 0, "g1", "m", m.TextPrompt("hi"), m.SamplingParams(), [])
        assemblers = [(i, 100 + i, PlainAssembler()) for i in range(num_choices)]
        self.request = self.table.add(message, self.reader, assemblers, 0.0)  # type: ignore[arg-type]

    @property
    def submissions(self) -> list[m.GenerateRequest]:
        return [message for message in self.sent if isinstance(message, m.GenerateRequest)]

    @property
    def cancels(self) -> list[m.Cancel]:
        return [message for message in self.sent if isinstance(message, m.Cancel)]

    def frame(
        self,
        first_index: int,
        token_ids: Sequence[int],
        *,
        finish: int = 0,
        epoch: int | None = None,
        choice: int = 0,
        sequence: int | None = None,
        worker: str = "w1",
        error: m.ErrorInfo | None = None,
    ) -> None:
        slot = self.request.streams[choice].slot
        number = self.sequence if sequence is None else sequence
        self.sequence = number + 1
        epochs = pack_u32([self.request.epoch if epoch is None else epoch])
        frame = m.TokenFrame(
            worker,
            1,
            number,
            pack_u32([slot]),
            epochs,
            pack_u32([first_index]),
            bytes([len(token_ids)]),
            bytes([finish]),
            pack_u32(token_ids),
            errors={0: error} if error else {},
        )
        self.table.on_frame(frame, self.now)

    def event(self, kind: str, role: m.Role = "worker", instance: str = "w1", error: WeftError | None = None) -> None:
        info = m.ErrorInfo.of(error) if error else None
        event = m.StreamEvent("r1", self.request.epoch, kind, role, instance, info, 5, 3)  # type: ignore[arg-type]
        self.table.on_event(event, self.now)

    def claim(self, role: m.Role = "worker", instance: str = "w1") -> None:
        self.table.on_claims(m.Claims(role, instance, ["r1"], pack_u32([self.request.epoch])), self.now)

    def at(self, now: float, missing: str = "") -> World:
        self.now = now
        self.table.tick(now, missing)
        return self
