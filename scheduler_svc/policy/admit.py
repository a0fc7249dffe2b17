"""Whether: is a new request taken, given what waits and runs already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from scheduler_svc.cost_model import CostModel
from scheduler_svc.ends import Ends
from weft.errors import Overloaded, WeftError
from weft.messages import TokenizedRequest

# What a client is told when the workers have measured nothing yet, and the bounds of what it is told otherwise.
DEFAULT_RETRY_S: Final = 1.0
MIN_RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 60.0
# First tokens are taken to come so much later than predicted. Predictions are right within some hundredths: with 1, one
# in seven of those that were taken was late by a hair (Azure's conversations and Vidur's papers at twice what workers
# can do, 2026).
CAUTION: Final = 1.1


@dataclass(frozen=True, slots=True)
class Objectives:
    """What an SLO class promises: seconds to the first token, and from one token to the next."""

    ttft_s: float = float("inf")
    tbt_s: float = float("inf")


NOTHING_PROMISED: Final = Objectives()


class BacklogView(msgspec.Struct, frozen=True):
    """What waits for a request's model, all requests together, and what its workers do in a second."""

    num_requests: int
    num_tokens: int  # to be prefilled
    num_new_tokens: float  # to be generated, as predicted
    prefill_tokens_per_s: float  # measured, over all ready workers that prefill; 0 = not yet
    decode_tokens_per_s: float


class LoadView(msgspec.Struct, frozen=True):
    """What the workers of a request's model have to do."""

    backlog: BacklogView
    num_prefilling: int  # ready workers that prefill, whatever else they do
    num_decoding: int
    num_queued_tokens: int  # to be prefilled: in the backlog, on the way, and in the workers
    num_running: int  # sequences that the workers hold
    now: float
    ends: Ends  # of requests that were sent and have not ended, of which this scheduler knows


class AdmitPolicy(Protocol):
    """Says why a request is refused, or None if it is taken.

    Asked only for requests that have not begun: a stream that lost its worker is never refused, since its client has
    been promised an answer already. `uses_load`: whether it is asked also when there is room, and needs a LoadView.
    """

    name: str
    uses_load: bool

    def decide(
        self, request: TokenizedRequest, backlog: BacklogView, load: Callable[[], LoadView]
    ) -> WeftError | None: ...


class Open:
    """Every request is taken, whatever waits. Source: the baseline that rejection is compared with.

    For benchmarks, and meshes whose gateways bound what comes in.
    """

    name = "open"
    uses_load = False

    def decide(self, request: TokenizedRequest, backlog: BacklogView, load: Callable[[], LoadView]) -> WeftError | None:
        return None


class Bounded:
    """At most so many requests and so many tokens wait; one more is refused with the time that the backlog will take.

    Invariant: the backlog's requests and tokens never pass the bounds, but for a single request that alone is larger.
    Source: vLLM's --max-num-queued-reqs and --max-num-queued-tokens.
    """

    name = "bounded"
    uses_load = False

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens

    def decide(self, request: TokenizedRequest, backlog: BacklogView, load: Callable[[], LoadView]) -> WeftError | None:
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


class EarlyReject:
    """A request is refused as it arrives if it, or what runs now, would miss an objective of its class.

    Its first token is expected when all that is queued, and itself, are prefilled by all workers together, at the rates
    that they measure beside their decodes, and when what has no place yet has had one; the time from token to token is
    that of the decodes that run now. Whichever is more than its objective refuses it, before anything is computed in
    vain. Workers that do nothing measure nothing: what they measured last, of a short prompt or a step full of prompts,
    would refuse all that comes for ever. Where that is all that is known, a request that meets nobody is taken.
    Invariant: without objectives nothing is refused. Source: Mooncake's early rejection (arXiv 2407.00079,
    section 7.3), whose load of decodes is that of this moment, so that pools swing against each other.
    """

    name = "early_reject"

    def __init__(
        self,
        cost: CostModel,
        objectives: Mapping[str, Objectives],
        also: AdmitPolicy,
        *,
        is_calibrated: bool = True,
    ) -> None:
        """`also`: bounds what waits in any case; `is_calibrated`: `cost` is not of what workers measured lately."""
        # Of what runs nobody need know where nothing is promised.
        self.uses_load = any(promised != NOTHING_PROMISED for promised in objectives.values())
        self._cost = cost
        self._objectives = objectives
        self._also = also
        self._is_calibrated = is_calibrated

    def decide(self, request: TokenizedRequest, backlog: BacklogView, load: Callable[[], LoadView]) -> WeftError | None:
        if (error := self._also.decide(request, backlog, load)) is not None:
            return error
        objectives = objectives_of(request, self._objectives)
        if objectives == NOTHING_PROMISED:
            return None
        view = load()
        if not (self._is_calibrated or view.num_running or view.num_queued_tokens or backlog.num_requests):
            return None
        ttft_s = CAUTION * (self._queue_s(view) + self._cost.prefill_s(request.num_tokens))
        if ttft_s > objectives.ttft_s:
            return _late("a first token", ttft_s, objectives.ttft_s, ttft_s - objectives.ttft_s)
        if objectives.tbt_s == float("inf"):
            return None
        running, context = self._decodes(request, view, ttft_s)
        num_workers = max(1, view.num_decoding)
        tbt_s = self._cost.overhead_s + self._cost.decode_s(1, 0) * -(-(running + 1) // num_workers)
        tbt_s += self._cost.context_s * (context + request.num_tokens) / num_workers
        if tbt_s > objectives.tbt_s:
            return _late("a token after another", tbt_s, objectives.tbt_s, retry_after(backlog))
        return None

    def _queue_s(self, view: LoadView) -> float:
        """Seconds until what came before will have had its turn."""
        backlog = view.backlog
        if backlog.prefill_tokens_per_s:
            prefill_s = view.num_queued_tokens / backlog.prefill_tokens_per_s
        else:
            prefill_s = self._cost.token_s * view.num_queued_tokens / max(1, view.num_prefilling)
        return prefill_s + _decode_s(backlog)

    def _decodes(self, request: TokenizedRequest, view: LoadView, ttft_s: float) -> tuple[int, int]:
        """Sequences that will decode beside this one, and the tokens that they see."""
        return view.num_running, view.ends.all().num_tokens


class PredictedReject(EarlyReject):
    """As `early_reject`, but for the decodes that will run when this request's prefill ends.

    Those that are predicted to end before do not count, and those that will have been prefilled by then do.
    Invariant: that of `early_reject`. Source: Mooncake's prediction-based early rejection (arXiv 2407.00079, section
    7.4), with a predicted end for each request where it has one time t_d for all.
    """

    name = "predicted_reject"

    def _decodes(self, request: TokenizedRequest, view: LoadView, ttft_s: float) -> tuple[int, int]:
        staying = view.ends.after(view.now + ttft_s)
        return staying.num_requests + view.backlog.num_requests, staying.num_tokens


def objectives_of(request: TokenizedRequest, objectives: Mapping[str, Objectives]) -> Objectives:
    """Of a request's class; those of the class "" for one that is not known."""
    return objectives.get(request.slo_class) or objectives.get("", NOTHING_PROMISED)


def retry_after(backlog: BacklogView) -> float:
    """Seconds until what waits now will have been served, by the workers' measured rates."""
    if not backlog.prefill_tokens_per_s and not backlog.decode_tokens_per_s:
        return DEFAULT_RETRY_S
    prefill_s = backlog.num_tokens / backlog.prefill_tokens_per_s if backlog.prefill_tokens_per_s else 0.0
    return _bounded(prefill_s + _decode_s(backlog))


@dataclass(frozen=True, slots=True)
class AdmitContext:
    """What policies are made with."""

    max_requests: int
    max_tokens: int
    cost: CostModel
    objectives: Mapping[str, Objectives]
    is_calibrated: bool = True  # whether `cost` is, or of what workers measured lately


ADMITS: Final[dict[str, Callable[[AdmitContext], AdmitPolicy]]] = {
    "open": lambda context: Open(),
    "bounded": lambda context: Bounded(context.max_requests, context.max_tokens),
    "early_reject": lambda context: _rejecting(EarlyReject, context),
    "predicted_reject": lambda context: _rejecting(PredictedReject, context),
}


def _rejecting(kind: type[EarlyReject], context: AdmitContext) -> EarlyReject:
    bounds = Bounded(context.max_requests, context.max_tokens)
    return kind(context.cost, context.objectives, bounds, is_calibrated=context.is_calibrated)


def _decode_s(backlog: BacklogView) -> float:
    """Seconds that what waits for a place will keep places, once all have one."""
    return backlog.num_new_tokens / backlog.decode_tokens_per_s if backlog.decode_tokens_per_s else 0.0


def _late(what: str, expected_s: float, objective_s: float, retry_s: float) -> Overloaded:
    return Overloaded(
        f"{what} is expected in {expected_s:.2f} s, and {objective_s:g} s are promised", retry_after_s=_bounded(retry_s)
    )


def _bounded(seconds: float) -> float:
    return min(MAX_RETRY_S, max(MIN_RETRY_S, seconds))
