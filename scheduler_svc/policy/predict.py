"""How long: tokens that a request will still generate, which nobody knows before it has.

Orders that prefer short requests, admission that looks ahead and routing by phase ask here. A policy learns from each
request that ended, and keeps count of how right it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from weft.messages import TokenizedRequest

# Tokens that a request is taken to generate if nothing is known of it.
ASSUMED_NEW_TOKENS: Final = 256
# Tokens of a bucket of output lengths, as DeepFlow's classifier has them.
BUCKET_TOKENS: Final = 128
# Ended requests that halve the weight of those before them.
HALF_LIFE: Final = 200.0
# Ended requests of one kind before they are believed.
MIN_LEARNT: Final = 8
# Kinds of requests that are kept apart, the least recently seen forgotten first.
MAX_KINDS: Final = 10_000


@dataclass(slots=True)
class Accuracy:
    """How right the predictions of whole lengths were."""

    num_ended: int = 0
    num_same_bucket: int = 0
    sum_error: float = 0.0  # absolute, in tokens

    def add(self, predicted: float, actual: int) -> None:
        self.num_ended += 1
        self.num_same_bucket += int(predicted) // BUCKET_TOKENS == actual // BUCKET_TOKENS
        self.sum_error += abs(predicted - actual)

    @property
    def same_bucket(self) -> float:
        """Share of the predictions that fell into the bucket of the actual length."""
        return self.num_same_bucket / self.num_ended if self.num_ended else 0.0

    @property
    def mean_error(self) -> float:
        return self.sum_error / self.num_ended if self.num_ended else 0.0


class PredictPolicy(Protocol):
    """Predicts output lengths of single choices."""

    name: str
    accuracy: Accuracy

    def remaining(self, request: TokenizedRequest, num_generated: int = 0) -> float:
        """Tokens that a choice will generate after the `num_generated` it has; more than 0, within its max_tokens."""

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A choice has ended. Mutates self."""


def clip(request: TokenizedRequest, remaining: float, num_generated: int) -> float:
    """A prediction within what the request allows: at least 1 token."""
    most = request.sampling.max_tokens
    return max(1.0, remaining if most is None else min(remaining, most - num_generated))


class NoPrediction:
    """Every request generates what it may, or a fixed number if it does not say. Source: what engines reserve for."""

    name = "none"

    def __init__(self) -> None:
        self.accuracy = Accuracy()

    def remaining(self, request: TokenizedRequest, num_generated: int = 0) -> float:
        whole = ASSUMED_NEW_TOKENS if request.sampling.max_tokens is None else request.sampling.max_tokens
        return clip(request, whole - num_generated, num_generated)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.accuracy.add(ASSUMED_NEW_TOKENS, num_output_tokens)


@dataclass(slots=True)
class _Histogram:
    """Output lengths in buckets, older ones weighing less."""

    counts: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)  # of the lengths in each bucket
    num_seen: int = 0

    def add(self, length: int) -> None:
        self.num_seen += 1
        bucket = length // BUCKET_TOKENS
        missing = bucket + 1 - len(self.counts)
        if missing > 0:
            self.counts += [0.0] * missing
            self.sums += [0.0] * missing
        decay = 0.5 ** (1 / HALF_LIFE)
        self.counts = [count * decay for count in self.counts]
        self.sums = [value * decay for value in self.sums]
        self.counts[bucket] += 1
        self.sums[bucket] += length

    def mean_beyond(self, length: int) -> float | None:
        """Mean length of those that are longer than `length`, None if there are none to speak of."""
        count = total = 0.0
        for bucket in range(length // BUCKET_TOKENS, len(self.counts)):
            if not self.counts[bucket]:
                continue
            mean = self.sums[bucket] / self.counts[bucket]
            # Of the bucket that `length` is in, only what is beyond.
            if mean > length:
                count += self.counts[bucket]
                total += self.sums[bucket]
        return total / count if count > 1e-3 else None


class MeanLength:
    """The mean length of the requests that ended lately, whatever they asked.

    Invariant: predictions do not depend on the request but for what it has generated and may. Source: the uniform
    estimate t_d of Mooncake's early rejection (arXiv 2407.00079, section 7).
    """

    name = "mean"

    def __init__(self) -> None:
        self.accuracy = Accuracy()
        self._histogram = _Histogram()

    def remaining(self, request: TokenizedRequest, num_generated: int = 0) -> float:
        return clip(request, _beyond([self._histogram], num_generated) - num_generated, num_generated)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.accuracy.add(_beyond([self._histogram], 0), num_output_tokens)
        self._histogram.add(num_output_tokens)


class Bucket:
    """What requests of the same tenant with prompts of about this length generated, in buckets of 128 tokens.

    Prompts are of one kind from 128 * 2^k tokens to twice that. A tenant without enough ended requests of a kind is
    taken for an average one. Having generated some, a request is one of those that generate at least as many, so its
    remainder is a conditional mean, and a wrong first guess mends itself as it runs.
    Invariant: with equal histories equal predictions; the prediction of a request that goes on beyond all that was
    seen is at least a bucket more. Source: DeepServe's decode length buckets (ATC '25, section 5), learnt online
    instead of by a classifier; the remainder is that of the Gittins index's denominators.
    """

    name = "bucket"

    def __init__(self) -> None:
        self.accuracy = Accuracy()
        self._kinds: OrderedDict[tuple[str, int], _Histogram] = OrderedDict()
        self._by_length: dict[int, _Histogram] = {}
        self._all = _Histogram()

    def remaining(self, request: TokenizedRequest, num_generated: int = 0) -> float:
        whole = self._whole(request.tenant, request.num_prompt_tokens, num_generated)
        return clip(request, whole - num_generated, num_generated)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.accuracy.add(self._whole(tenant, num_prompt_tokens, 0), num_output_tokens)
        length = _prompt_kind(num_prompt_tokens)
        self._kinds.setdefault((tenant, length), _Histogram()).add(num_output_tokens)
        self._kinds.move_to_end((tenant, length))
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        self._by_length.setdefault(length, _Histogram()).add(num_output_tokens)
        self._all.add(num_output_tokens)

    def _whole(self, tenant: str, num_prompt_tokens: int, num_generated: int) -> float:
        length = _prompt_kind(num_prompt_tokens)
        kinds = (self._kinds.get((tenant, length)), self._by_length.get(length), self._all)
        return _beyond([kind for kind in kinds if kind is not None], num_generated)


class Oracle:
    """The true lengths, by request id: the bound of what any prediction can give. For the simulator only."""

    name = "oracle"

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.accuracy = Accuracy()
        self._lengths = lengths

    def remaining(self, request: TokenizedRequest, num_generated: int = 0) -> float:
        return max(1.0, self._lengths[request.request_id] - num_generated)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.accuracy.add(num_output_tokens, num_output_tokens)


PREDICTORS: Final[dict[str, type[NoPrediction] | type[MeanLength] | type[Bucket]]] = {
    "none": NoPrediction,
    "mean": MeanLength,
    "bucket": Bucket,
}


def _prompt_kind(num_prompt_tokens: int) -> int:
    return (num_prompt_tokens // BUCKET_TOKENS).bit_length()


def _beyond(histograms: list[_Histogram], num_generated: int) -> float:
    """Mean whole length beyond what was generated, by the first histogram that has seen enough."""
    for histogram in histograms:
        if histogram.num_seen >= MIN_LEARNT:
            mean = histogram.mean_beyond(num_generated)
            return float(num_generated + BUCKET_TOKENS) if mean is None else mean
    return float(max(ASSUMED_NEW_TOKENS, num_generated + BUCKET_TOKENS))
