"""Every subject on the bus, and which role may use it.

Nothing that a client sent enters a subject: model names become tokens (`model_token`), ids are made by servers.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from weft.messages import VERSION, Role

PREFIX = f"weft.v{VERSION}"
CANCEL = f"{PREFIX}.cancel"
ALIVE_ALL = f"{PREFIX}.alive.>"
STATUS_ALL = f"{PREFIX}.status.*"
KV_ALL = f"{PREFIX}.kv.*"
ENDED_ALL = f"{PREFIX}.ended.*"
SCHEDULE_ALL = f"{PREFIX}.schedule.*"
SCALE_ALL = f"{PREFIX}.scale.*"

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


def model_token(name: str) -> str:
    """A subject-safe token for a served model name; names that differ give tokens that differ."""
    safe = _UNSAFE.sub("_", name)
    if safe == name and len(name) <= 48:
        return name
    return f"{safe[:40]}_{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"


def tokenize(model: str) -> str:
    return f"{PREFIX}.tokenize.{model_token(model)}"


def schedule(model: str) -> str:
    return f"{PREFIX}.schedule.{model_token(model)}"


def model(model: str) -> str:
    return f"{PREFIX}.model.{model_token(model)}"


def assign(worker: str) -> str:
    return f"{PREFIX}.worker.{worker}.assign"


def declined(scheduler: str) -> str:
    return f"{PREFIX}.scheduler.{scheduler}.declined"


def gateway_all(gateway: str) -> str:
    """One subscription for frames and events, so that they are handled in the order in which they were sent."""
    return f"{PREFIX}.gateway.{gateway}.>"


def frames(gateway: str) -> str:
    return f"{PREFIX}.gateway.{gateway}.frames"


def events(gateway: str) -> str:
    return f"{PREFIX}.gateway.{gateway}.events"


def status(worker: str) -> str:
    return f"{PREFIX}.status.{worker}"


def ended(worker: str) -> str:
    return f"{PREFIX}.ended.{worker}"


def scale(model: str) -> str:
    return f"{PREFIX}.scale.{model_token(model)}"


def kv(holder: str) -> str:
    return f"{PREFIX}.kv.{holder}"


def alive(role: Role, instance: str) -> str:
    return f"{PREFIX}.alive.{role}.{instance}"


def control(role: Role, instance: str) -> str:
    return f"{PREFIX}.control.{role}.{instance}"


def cache(shard: str) -> str:
    return f"{PREFIX}.cache.{shard}"


@dataclass(frozen=True, slots=True)
class Returned:
    """A hop that came back to its sender: NATS's 503, or a `Refused`."""

    gateway: str
    request_id: str
    epoch: int


def returned(role: Role, instance: str, gateway: str, request_id: str, epoch: int) -> str:
    """The reply subject of a hop.

    NATS answers 503 to a publisher whose subject nobody listens to, but only on a subscription of the publisher's
    own connection (nats-server 2.15, measured): so each sender of a hop listens for its own returns, and tells
    the gateway.
    """
    return f"{PREFIX}.returned.{role}.{instance}.{gateway}.{request_id}.{epoch}"


def returned_all(role: Role, instance: str) -> str:
    return f"{PREFIX}.returned.{role}.{instance}.>"


def parse_returned(subject: str) -> Returned:
    gateway, request_id, epoch = subject.split(".")[-3:]
    return Returned(gateway, request_id, int(epoch))


@dataclass(frozen=True, slots=True)
class Permissions:
    """What one role's NATS user may publish and subscribe to."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def _inbox(role: str) -> str:
    return f"_INBOX.{role}.>"


def _common(role: Role, publish: tuple[str, ...], subscribe: tuple[str, ...]) -> Permissions:
    return Permissions(
        publish=(f"{PREFIX}.alive.{role}.*", *publish),
        subscribe=(ALIVE_ALL, f"{PREFIX}.control.{role}.*", f"{PREFIX}.returned.{role}.>", _inbox(role), *subscribe),
    )


# Replies to requests go to the asker's inbox: `_INBOX.<role>.>` is listed where a role answers that asker.
PERMISSIONS: dict[Role, Permissions] = {
    "gateway": _common(
        "gateway",
        publish=(f"{PREFIX}.tokenize.*", f"{PREFIX}.model.*", CANCEL, _inbox("supervisor")),
        subscribe=(f"{PREFIX}.gateway.>", SCALE_ALL),
    ),
    "tokenizer": _common(
        "tokenizer",
        publish=(
            f"{PREFIX}.schedule.*",
            f"{PREFIX}.gateway.*.events",
            f"{PREFIX}.returned.gateway.>",
            _inbox("gateway"),
            _inbox("supervisor"),
        ),
        subscribe=(f"{PREFIX}.tokenize.*", f"{PREFIX}.model.*"),
    ),
    "scheduler": _common(
        "scheduler",
        publish=(
            f"{PREFIX}.worker.*.assign",
            f"{PREFIX}.gateway.*.events",
            f"{PREFIX}.control.worker.*",
            f"{PREFIX}.returned.tokenizer.>",
            f"{PREFIX}.returned.worker.>",
            SCALE_ALL,
            _inbox("supervisor"),
        ),
        subscribe=(SCHEDULE_ALL, f"{PREFIX}.scheduler.>", STATUS_ALL, KV_ALL, ENDED_ALL, SCALE_ALL, CANCEL),
    ),
    "worker": _common(
        "worker",
        publish=(
            f"{PREFIX}.gateway.*.frames",
            f"{PREFIX}.gateway.*.events",
            f"{PREFIX}.scheduler.*.declined",
            f"{PREFIX}.status.*",
            f"{PREFIX}.kv.*",
            f"{PREFIX}.ended.*",
            f"{PREFIX}.cache.*",
            f"{PREFIX}.returned.scheduler.>",
            _inbox("scheduler"),
            _inbox("supervisor"),
        ),
        subscribe=(f"{PREFIX}.worker.>", CANCEL),
    ),
    "cache": _common(
        "cache",
        publish=(_inbox("worker"), _inbox("supervisor")),
        subscribe=(f"{PREFIX}.cache.*",),
    ),
    "supervisor": _common(
        "supervisor",
        publish=(f"{PREFIX}.alive.>", f"{PREFIX}.control.>"),
        subscribe=(STATUS_ALL, SCALE_ALL),
    ),
}
