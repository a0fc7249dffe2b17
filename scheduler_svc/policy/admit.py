"""Whether: is a new request taken, given what waits already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from weft.errors import Overloaded, WeftError
from weft.messages import TokenizedRequest

# What a client is told when the workers have measured nothing yet, and the bounds of what it is told otherwise.
DEFAULT_RETRY_S: Final = 1.0
MIN_RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 60.0
# Tokens that a request is taken to generate if it does not say.
ASSUMED_NEW_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class BacklogView:
    """What waits for a request's model, all requests together, and what its workers do in a second."""

    num_requests: int
    num_tokens: int  # to be prefilled
    num_new_tokens: int  # to be generated at most, or assumed
    prefill_tokens_per_s: float  # measured, over all ready workers; 0 = not yet
    decode_tokens_per_s: float


class AdmitPolicy(Protocol):
    """Says why a request is refused, or None if it is taken.

    Asked only for requests that cannot go on at once and have not begun: a stream that lost its worker is never
    refused, since its client has been promised an answer already.
    """

    name: str

    def decide(self, request: TokenizedRequest, backlog: BacklogView) -> WeftError | None: ...


class Open:
    """Every request is taken. For benchmarks, and meshes whose gateways bound what comes in."""

    name = "open"

    def decide(self, request: TokenizedRequest, backlog: BacklogView) -> WeftError | None:
        return None


class Bounded:
    """At most so many requests and so many tokens wait; one more is refused with the time that the backlog will take.

    Invariant: the backlog's requests and tokens never pass the bounds, but for a single request that alone is larger.
    Source: vLLM's --max-num-queued-reqs and --max-num-queued-tokens.
    """

    name = "bounded"

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens

    def decide(self, request: TokenizedRequest, backlog: BacklogView) -> WeftError | None:
        if not backlog.num_requests:
            return None
        if backlog.num_requests >= self._max_requests:
            return Overloaded(
                f"{backlog.num_requests} requests are waiting already", retry_after_s=retry_after(backlog)
            )
        if backlog.num_tokens + request.num_tokens > self._max_tokens:
            return Overloaded(
                f"{backlog.num_tokens} prompt tokens are waiting already", retry_after_s=retry_after(backlog)
            )
        return None


def retry_after(backlog: BacklogView) -> float:
    """Seconds until what waits now will have been served, by the workers' measured rates."""
    if not backlog.prefill_tokens_per_s and not backlog.decode_tokens_per_s:
        return DEFAULT_RETRY_S
    seconds = 0.0
    if backlog.prefill_tokens_per_s:
        seconds += backlog.num_tokens / backlog.prefill_tokens_per_s
    if backlog.decode_tokens_per_s:
        seconds += backlog.num_new_tokens / backlog.decode_tokens_per_s
    return min(MAX_RETRY_S, max(MIN_RETRY_S, seconds))


def new_tokens(request: TokenizedRequest) -> int:
    """Tokens that a request may still generate."""
    each = ASSUMED_NEW_TOKENS if request.sampling.max_tokens is None else request.sampling.max_tokens
    return sum(max(0, each - len(choice.emitted) // 4) for choice in request.choices)


def make(name: str, max_requests: int, max_tokens: int) -> AdmitPolicy:
    """The policy of that name. Raises KeyError for any other."""
    policies: dict[str, AdmitPolicy] = {"open": Open(), "bounded": Bounded(max_requests, max_tokens)}
    return policies[name]
