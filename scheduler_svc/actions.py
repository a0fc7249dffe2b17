"""What the scheduler decides: plans that the shell carries out, and that explain themselves. Pure.

What is made for each request is a `msgspec.Struct` here and in all that decides: a frozen dataclass takes ten times as
long to make.
"""

from __future__ import annotations

import msgspec

from weft.errors import WeftError
from weft.messages import BacklogPlace, Decision, TokenizedRequest


class Dispatch(msgspec.Struct, frozen=True):
    """Send the request to the worker that was decided on."""

    request: TokenizedRequest
    decision: Decision
    stop_after: int | None = None  # tokens of each choice after which the worker is to hand it back


class Reject(msgspec.Struct, frozen=True):
    """Tell the gateway that the request will not be served."""

    request: TokenizedRequest
    error: WeftError


class Queued(msgspec.Struct, frozen=True):
    """Tell the gateway that the request waits here."""

    request: TokenizedRequest
    place: BacklogPlace


class Lost(msgspec.Struct, frozen=True):
    """Hand the request back to the gateway, which sends it into the ring again."""

    request: TokenizedRequest
    error: WeftError


class Dropped(msgspec.Struct, frozen=True):
    """The request is let go of without a word: cancelled, superseded, or its gateway is gone."""

    request: TokenizedRequest
    reason: str


class WantSnapshot(msgspec.Struct, frozen=True):
    """Ask the worker for all the blocks it holds: some of its news was missed."""

    worker: str


Action = Dispatch | Reject | Queued | Lost | Dropped | WantSnapshot
