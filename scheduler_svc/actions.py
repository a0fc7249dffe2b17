"""What the scheduler decides: plans that the shell carries out, and that explain themselves. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from weft.errors import WeftError
from weft.messages import BacklogPlace, Decision, TokenizedRequest


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request to the worker that was decided on."""

    request: TokenizedRequest
    decision: Decision
    stop_after: int | None = None  # tokens of each choice after which the worker is to hand it back


@dataclass(frozen=True, slots=True)
class Reject:
    """Tell the gateway that the request will not be served."""

    request: TokenizedRequest
    error: WeftError


@dataclass(frozen=True, slots=True)
class Queued:
    """Tell the gateway that the request waits here."""

    request: TokenizedRequest
    place: BacklogPlace


@dataclass(frozen=True, slots=True)
class Lost:
    """Hand the request back to the gateway, which sends it into the ring again."""

    request: TokenizedRequest
    error: WeftError


@dataclass(frozen=True, slots=True)
class Dropped:
    """The request is let go of without a word: cancelled, superseded, or its gateway is gone."""

    request: TokenizedRequest
    reason: str


@dataclass(frozen=True, slots=True)
class WantSnapshot:
    """Ask the worker for all the blocks it holds: some of its news was missed."""

    worker: str


Action = Dispatch | Reject | Queued | Lost | Dropped | WantSnapshot
