"""How long: tokens that a request will still generate, which nobody knows before it has.

Orders that prefer short requests, admission that looks ahead and routing by phase ask here. A policy learns from each
request that ended, and keeps count of how right it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, TypeVar

from weft.messages import TokenizedRequest

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Tokens that a request is taken to generate if nothing is known of it.
ASSUMED_NEW_TOKENS: Final = 256
# Tokens of a bucket of output lengths, as DeepFlow's classifier has them.
BUCKET_TOKENS: Final = 128
# Ended requests that halve the weight of those before them: of all requests, and in the trust in a tenant's kinds.
HALF_LIFE: Final = 200.0
# Ended requests of one kind that do so in its own lengths. With 200 they are known to 1.5 % more where nothing changes,
# and too late for any use where something does.
KIND_HALF_LIFE: Final = 10.0
# Ended requests of one kind before they are believed.
MIN_LEARNT: Final = 8
# What kinds are trusted by before there is enough that speaks against them, in squares of tokens.
ASSUMED_TRUE: Final = float(MIN_LEARNT * BUCKET_TOKENS**2)
# What weights may grow to before all are made smaller.
MAX_WEIGHT: Final = 1e9
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


class Guess(NamedTuple):
    """What is predicted of a choice, in tokens, and what that was made of."""

    remaining: float  # that it will generate still; at least 1, within its max_tokens
    whole: float  # that it will have generated, whatever its max_tokens
    of_kind: float  # mean length of its kind
    of_all: float  # of all requests


class PredictPolicy(Protocol):
    """Predicts output lengths of single choices."""

    name: str
    accuracy: Accuracy

    def guess(self, request: TokenizedRequest, num_generated: int = 0) -> Guess:
        """Of a choice that has `num_generated` tokens."""

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int, guess: Guess | None = None) -> None:
        """A choice has ended. Mutates self.

        `guess`: by what it was scheduled; None if that is not known, and then what would be guessed now is judged. What
        was guessed when it mattered may have been wrong for longer than what is guessed when it shows.
        """


class NoPrediction:
    """Every request generates what it may, or a fixed number if it does not say.

    Invariant: nothing that ended changes a prediction. Source: what engines reserve for.
    """

    name = "none"

    def __init__(self) -> None:
        self.accuracy = Accuracy()

    def guess(self, request: TokenizedRequest, num_generated: int = 0) -> Guess:
        most = request.sampling.max_tokens
        whole = float(ASSUMED_NEW_TOKENS if most is None else most)
        return _guess(request, num_generated, whole, whole, whole)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int, guess: Guess | None = None) -> None:
        self.accuracy.add(ASSUMED_NEW_TOKENS if guess is None else guess.whole, num_output_tokens)


@dataclass(slots=True)
class _Histogram:
    """Output lengths in buckets, older ones weighing less."""

    half_life: float = HALF_LIFE
    # By bucket, how many there were and the sum of their lengths, with their weights.
    counts: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    count: float = 0.0  # over all buckets
    total: float = 0.0
    weight: float = 1.0  # of the last one, which grows instead of the others' shrinking
    num_seen: int = 0

    def add(self, length: int) -> None:
        self.num_seen += 1
        bucket = length // BUCKET_TOKENS
        missing = bucket + 1 - len(self.counts)
        if missing > 0:
            self.counts += [0.0] * missing
            self.sums += [0.0] * missing
        self.weight *= 2 ** (1 / self.half_life)
        self.counts[bucket] += self.weight
        self.sums[bucket] += self.weight * length
        self.count += self.weight
        self.total += self.weight * length
        if self.weight > MAX_WEIGHT:
            self._scale(1 / self.weight)

    def _scale(self, factor: float) -> None:
        self.counts = [count * factor for count in self.counts]
        self.sums = [value * factor for value in self.sums]
        self.weight, self.count, self.total = self.weight * factor, sum(self.counts), sum(self.sums)

    def mean_beyond(self, length: int) -> float | None:
        """Mean length of those that are longer than `length`, None if there are none to speak of."""
        if not length:
            return self.total / self.count if self.count else None
        count = total = 0.0
        for bucket in range(length // BUCKET_TOKENS, len(self.counts)):
            if not self.counts[bucket]:
                continue
            mean = self.sums[bucket] / self.counts[bucket]
            # Of the bucket that `length` is in, only what is beyond.
            if mean > length:
                count += self.counts[bucket]
                total += self.sums[bucket]
        return total / count if count > 1e-3 * self.weight else None


class MeanLength:
    """The mean length of the requests that ended lately, whatever they asked.

    Invariant: predictions do not depend on the request but for what it has generated and may. Source: the uniform
    estimate t_d of Mooncake's early rejection (arXiv 2407.00079, section 7).
    """

    name = "mean"

    def __init__(self) -> None:
        self.accuracy = Accuracy()
        self._histogram = _Histogram()

    def guess(self, request: TokenizedRequest, num_generated: int = 0) -> Guess:
        whole = _beyond(self._histogram, num_generated)
        return _guess(request, num_generated, whole, whole, whole)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int, guess: Guess | None = None) -> None:
        self.accuracy.add(_beyond(self._histogram, 0) if guess is None else guess.whole, num_output_tokens)
        self._histogram.add(num_output_tokens)


@dataclass(slots=True)
class _Trust:
    """How much of what kinds say beyond the mean of all has been true: the slope of actual over said differences.

    Besides what was seen, a few requests count that were said to be a bucket away from the mean, and were.
    """

    sum_said: float = 0.0  # squares of said differences
    sum_true: float = 0.0  # products of said and actual ones

    def add(self, said: float, mean: float, actual: int) -> None:
        decay = 0.5 ** (1 / HALF_LIFE)
        self.sum_said = self.sum_said * decay + (said - mean) ** 2
        self.sum_true = self.sum_true * decay + (said - mean) * (actual - mean)

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, (ASSUMED_TRUE + self.sum_true) / (ASSUMED_TRUE + self.sum_said)))


class Bucket:
    """What requests of the same tenant with prompts of about this length generated, in buckets of 128 tokens.

    Prompts are of one kind from 128 * 2^k tokens to twice that. A tenant without enough ended requests of a kind is
    taken for an average one. Having generated some, a request is one of those that generate at least as many, so its
    remainder is a conditional mean, and a wrong first guess mends itself as it runs.
    A kind counts as far as it has been right: the prediction lies between the mean of all requests and that of the
    kind, by the slope at which the lengths of the tenant's requests have followed what their kinds said. So kinds that
    say nothing, or the contrary, fade out, and nobody but the tenant itself suffers from one that is unpredictable.
    Invariants: with equal histories equal predictions; a prediction lies between that of the kind and that of `mean`;
    that of a request that goes on beyond all that was seen is at least a bucket more. Sources: DeepServe's decode
    length buckets (ATC '25, section 5), learnt online instead of by a classifier; the remainder is that of the Gittins
    index's denominators; shrinkage by the slope is Copas's (1983, Regression, prediction and shrinkage).
    """

    name = "bucket"

    def __init__(self) -> None:
        self.accuracy = Accuracy()
        self._kinds: OrderedDict[tuple[str, int], _Histogram] = OrderedDict()
        self._by_length: dict[int, _Histogram] = {}
        self._all = _Histogram()
        self._trust: OrderedDict[str, _Trust] = OrderedDict()

    def guess(self, request: TokenizedRequest, num_generated: int = 0) -> Guess:
        return _guess(request, num_generated, *self._means(request.tenant, request.num_prompt_tokens, num_generated))

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int, guess: Guess | None = None) -> None:
        whole, of_kind, of_all = self._means(tenant, num_prompt_tokens, 0) if guess is None else guess[1:]
        self.accuracy.add(whole, num_output_tokens)
        length = _prompt_kind(num_prompt_tokens)
        kind = _recent(self._kinds, (tenant, length), _new_kind)
        if kind.num_seen >= MIN_LEARNT:
            _recent(self._trust, tenant, _Trust).add(of_kind, of_all, num_output_tokens)
        kind.add(num_output_tokens)
        self._by_length.setdefault(length, _new_kind()).add(num_output_tokens)
        self._all.add(num_output_tokens)

    def _means(self, tenant: str, num_prompt_tokens: int, num_generated: int) -> tuple[float, float, float]:
        """Lengths: what is predicted, and the means of the kind and of all that it was made of."""
        length = _prompt_kind(num_prompt_tokens)
        of_kind = of_all = _beyond(self._all, num_generated)
        for kind in (self._kinds.get((tenant, length)), self._by_length.get(length)):
            if kind is not None and kind.num_seen >= MIN_LEARNT:
                of_kind = _beyond(kind, num_generated)
                break
        trust = self._trust.get(tenant)
        share = 1.0 if trust is None else trust.share
        return of_all + share * (of_kind - of_all), of_kind, of_all


class Oracle:
    """The true lengths, by request id: the bound of what any prediction can give. For the simulator only."""

    name = "oracle"

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.accuracy = Accuracy()
        self._lengths = lengths

    def guess(self, request: TokenizedRequest, num_generated: int = 0) -> Guess:
        whole = float(self._lengths[request.request_id])
        return Guess(max(1.0, whole - num_generated), whole, whole, whole)

    def learn(self, tenant: str, num_prompt_tokens: int, num_output_tokens: int, guess: Guess | None = None) -> None:
        self.accuracy.add(num_output_tokens, num_output_tokens)


PREDICTORS: Final[dict[str, type[NoPrediction] | type[MeanLength] | type[Bucket]]] = {
    "none": NoPrediction,
    "mean": MeanLength,
    "bucket": Bucket,
}


def _guess(request: TokenizedRequest, num_generated: int, whole: float, of_kind: float, of_all: float) -> Guess:
    most, remaining = request.sampling.max_tokens, whole - num_generated
    if most is not None:
        remaining = min(remaining, most - num_generated)
    return Guess(max(1.0, remaining), whole, of_kind, of_all)


def _prompt_kind(num_prompt_tokens: int) -> int:
    return (num_prompt_tokens // BUCKET_TOKENS).bit_length()


def _new_kind() -> _Histogram:
    return _Histogram(KIND_HALF_LIFE)


def _recent(known: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is known of a key, or what `make` gives; the least recently asked for is forgotten if there are too many."""
    if key not in known:
        known[key] = make()
    known.move_to_end(key)
    if len(known) > MAX_KINDS:
        known.popitem(last=False)
    return known[key]


def _beyond(histogram: _Histogram, num_generated: int) -> float:
    """Mean whole length beyond what was generated."""
    if histogram.num_seen < MIN_LEARNT:
        return float(max(ASSUMED_NEW_TOKENS, num_generated + BUCKET_TOKENS))
    mean = histogram.mean_beyond(num_generated)
    return float(num_generated + BUCKET_TOKENS) if mean is None else mean
