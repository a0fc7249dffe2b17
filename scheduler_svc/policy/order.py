"""When: which of the requests that wait for a model goes next.

A policy owns the waiting requests of one model, so that each can keep them as its rule needs: a heap, queues by
tenant, levels. The scheduler asks for the head, and takes it out when it has a place for it. What has begun and lost
its worker goes before all others whatever the policy: its client has been promised an answer already.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

import msgspec

from scheduler_svc.policy.predict import Guess
from weft.messages import TokenizedRequest

# Seconds of waiting that make up for one step of priority.
AGEING_S: Final = 10.0
# Tokens of an answer that take as long as one of a prompt: on an a100 .14 ms, and 23 ms of a step for a batch of 16.
PROMPT_WORK: Final = 0.1
# SRPT: tokens of an answer by which a second of waiting makes a request shorter.
AGEING_TOKENS: Final = 6.0
# MLFQ: tokens that a request may use up on the first level, and how many levels there are; each has twice as many.
FIRST_QUANTUM: Final = 256
NUM_LEVELS: Final = 8
# MLFQ: a request that waits longer than this goes to the first level.
STARVATION_S: Final = 30.0
# VTC: what a token of the answer weighs against one of the prompt.
OUTPUT_WEIGHT: Final = 2.0


class Waiting(msgspec.Struct, frozen=True):
    """A request in the backlog, and what policies may know of it.

    `ticket` counts arrivals; a request that is put back keeps its own.
    """

    request: TokenizedRequest
    ticket: int
    since: float  # monotonic seconds
    remaining: float = 0.0  # tokens that it is predicted to generate still, over all choices
    num_matched: int = 0  # prompt tokens whose KV some worker holds
    deadline: float = float("inf")  # for its first token, monotonic seconds
    guess: Guess | None = None  # of its first choice

    @property
    def num_generated(self) -> int:
        """Tokens that it has, over all choices."""
        return self.request.num_tokens - self.request.num_prompt_tokens

    @property
    def num_to_prefill(self) -> int:
        return max(0, self.request.num_tokens - self.num_matched)


class OrderPolicy(Protocol):
    """The waiting requests of one model."""

    name: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Waiting]: ...

    def add(self, waiting: Waiting, now: float) -> None:
        """Mutates self. No request of that id may be waiting."""

    def head(self, now: float) -> Waiting | None:
        """The request that goes next; None if none waits."""

    def remove(self, request_id: str) -> None:
        """Mutates self. Raises KeyError if it does not wait."""

    def quantum(self, waiting: Waiting) -> int | None:
        """Tokens of each choice after which a worker hands it back, if it is sent now; None for all of them."""

    def on_sent(self, waiting: Waiting) -> None:
        """It was taken out to be computed. Mutates self."""

    def on_put_back(self, waiting: Waiting) -> None:
        """It was sent, and has not been taken: it will be added again. Mutates self."""

    def on_ended(self, tenant: str, predicted: float, actual: int) -> None:
        """A choice that was predicted to generate so many tokens has generated `actual`. Mutates self."""


Key = Callable[[Waiting], tuple[float, ...]]


class _ByKey:
    """Least key first; of equal keys the first ticket. Keys never change, so a heap keeps them."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self._heap: list[tuple[bool, tuple[float, ...], int, str]] = []
        self._waiting: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(list(self._waiting.values()))

    def add(self, waiting: Waiting, now: float) -> None:
        request = waiting.request
        self._waiting[request.request_id] = waiting
        entry = (not request.is_recovered, self._key(waiting), waiting.ticket, request.request_id)
        heapq.heappush(self._heap, entry)

    def head(self, now: float) -> Waiting | None:
        while self._heap:
            _, key, ticket, request_id = self._heap[0]
            waiting = self._waiting.get(request_id)
            if waiting is not None and waiting.ticket == ticket and self._key(waiting) == key:
                return waiting
            # It has left since.
            heapq.heappop(self._heap)
        return None

    def remove(self, request_id: str) -> None:
        del self._waiting[request_id]

    def quantum(self, waiting: Waiting) -> int | None:
        return None

    def on_sent(self, waiting: Waiting) -> None:
        pass

    def on_put_back(self, waiting: Waiting) -> None:
        pass

    def on_ended(self, tenant: str, predicted: float, actual: int) -> None:
        pass


class Fcfs(_ByKey):
    """First come, first served.

    Invariant: the one that arrived first leaves first, whatever was put back between. No starvation, since the head
    waits for room and nothing passes it. Source: Orca (OSDI '22) section 3.2.
    """

    name = "fcfs"

    def __init__(self) -> None:
        super().__init__(lambda waiting: ())


class Priority(_ByKey):
    """The lowest `priority` first, but each 10 seconds of waiting count as one step of it.

    All age alike, so the key priority * 10 s + arrival never changes. Invariant, and why nobody starves: a request is
    passed only by those that arrive within 10 s for each step between their priorities.
    Source: vLLM's priority scheduling, where lower is earlier; ageing as in every textbook's operating system.
    """

    name = "priority"

    def __init__(self) -> None:
        super().__init__(lambda waiting: (waiting.request.priority * AGEING_S + waiting.since,))


class Sjf(_ByKey):
    """The shortest first: the least work of prompt and predicted answer, from the start.

    Invariant: no request leaves while a shorter one waits. Long ones may starve while short ones keep coming.
    Source: the survey's SJF (arXiv 2506.21901, section 3); the mean completion time is the least there is without
    preemption (Smith 1956).
    """

    name = "sjf"

    def __init__(self) -> None:
        super().__init__(lambda waiting: (_work(waiting.request.num_prompt_tokens, _whole_length(waiting)),))


class Srpt(_ByKey):
    """The shortest remaining work first: what is to be prefilled still, and the predicted rest of the answer.

    Each second of waiting counts as 6 tokens of it. All age alike, so the key work + 6 tokens * arrival never changes.
    Invariant, and why nobody starves, however wrong predictions are: a request is passed only by those that arrive
    within a second for each 6 tokens by which they seem shorter.
    Source: Schrage 1968, optimal for the mean without ageing; with predictions as in TRAIL (arXiv 2410.01035).
    """

    name = "srpt"

    def __init__(self) -> None:
        super().__init__(
            lambda waiting: (_work(waiting.num_to_prefill, waiting.remaining) + AGEING_TOKENS * waiting.since,)
        )


class Edf(_ByKey):
    """The earliest deadline for a first token first; those without one last.

    Invariant: deadlines leave in order. Those without one may starve. Source: Liu and Layland 1973; deadlines are those
    of SLO classes.
    """

    name = "edf"

    def __init__(self) -> None:
        super().__init__(lambda waiting: (waiting.deadline, waiting.since))


class PrefixFirst(_ByKey):
    """The longest cached prefix first, as it was when the request arrived.

    Invariant: no request leaves while one with more cached tokens waits. Those that share nothing may starve.
    Source: SGLang's longest prefix match (NeurIPS '24, section 3), whose matches are looked up anew for each batch.
    """

    name = "prefix_first"

    def __init__(self) -> None:
        super().__init__(lambda waiting: (-waiting.num_matched,))


class Mlfq:
    """Levels with quanta that double: work on the first level that has a request, in its order of arrival.

    A request joins the first level whose quantum its prompt does not exceed (skip-join), and goes down when prompt and
    answer have used up a level's: the worker then hands it back, and it waits behind those of its new level. One that
    waits longer than 30 s goes to the first level.
    Invariants: a request's level never falls below what its work says, and it leaves before any of a deeper level,
    unless that one has starved; so nobody starves. Source: FastServe (arXiv 2305.05920, section 4), whose quanta are
    times of iterations; ours are tokens, which the scheduler knows.
    """

    name = "mlfq"

    def __init__(self) -> None:
        self._levels = [Fcfs() for _ in range(NUM_LEVELS)]
        self._recovered = Fcfs()
        self._queue_of: dict[str, Fcfs] = {}

    def __len__(self) -> int:
        return len(self._queue_of)

    def __iter__(self) -> Iterator[Waiting]:
        return iter([waiting for queue in (self._recovered, *self._levels) for waiting in queue])

    def add(self, waiting: Waiting, now: float) -> None:
        request = waiting.request
        queue = self._recovered if request.is_recovered else self._levels[_level_of(waiting)]
        queue.add(waiting, now)
        self._queue_of[request.request_id] = queue

    def head(self, now: float) -> Waiting | None:
        if (recovered := self._recovered.head(now)) is not None:
            return recovered
        heads = [head for level in self._levels if (head := level.head(now)) is not None]
        starved = [waiting for waiting in heads if now - waiting.since > STARVATION_S]
        if starved:
            return min(starved, key=lambda waiting: waiting.since)
        return heads[0] if heads else None

    def remove(self, request_id: str) -> None:
        self._queue_of.pop(request_id).remove(request_id)

    def quantum(self, waiting: Waiting) -> int | None:
        level = _level_of(waiting)
        if level == NUM_LEVELS - 1:
            return None
        return max(1, _up_to(level) - waiting.request.num_prompt_tokens - _longest(waiting))

    def on_sent(self, waiting: Waiting) -> None:
        pass

    def on_put_back(self, waiting: Waiting) -> None:
        pass

    def on_ended(self, tenant: str, predicted: float, actual: int) -> None:
        pass


class Fair:
    """Of the tenants that wait, the one that has had least: tokens of prompts, and twice those of answers, by weight.

    A tenant that comes back after a pause starts at the least of those that wait, so that nobody saves up. An answer
    is charged as it is predicted when it is sent, and corrected when it has ended.
    Invariants: work conserving; between two tenants that both wait all the time, what they have had (by weight)
    differs by at most the largest request's charge in each worker's place, with right predictions. So no tenant
    starves. Source: virtual token counter (Sheng et al. 2024, OSDI, algorithm 2 and section 4.4 for predictions).
    """

    name = "fair"

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._queues: dict[str, Fcfs] = {}
        self._tenant_of: dict[str, str] = {}
        self._had: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._tenant_of)

    def __iter__(self) -> Iterator[Waiting]:
        return iter([waiting for queue in self._queues.values() for waiting in queue])

    def add(self, waiting: Waiting, now: float) -> None:
        tenant = waiting.request.tenant
        if tenant not in self._queues:
            # Of those that wait; without any, of the one that was served last.
            floor = min((self._had[other] for other in self._queues), default=max(self._had.values(), default=0.0))
            self._had[tenant] = max(self._had.get(tenant, 0.0), floor)
            self._queues[tenant] = Fcfs()
        self._queues[tenant].add(waiting, now)
        self._tenant_of[waiting.request.request_id] = tenant

    def head(self, now: float) -> Waiting | None:
        heads = [(tenant, head) for tenant, queue in self._queues.items() if (head := queue.head(now)) is not None]
        recovered = [head for _, head in heads if head.request.is_recovered]
        if recovered:
            return min(recovered, key=lambda waiting: waiting.ticket)
        return min(heads, key=lambda entry: (self._had[entry[0]], entry[1].ticket))[1] if heads else None

    def remove(self, request_id: str) -> None:
        tenant = self._tenant_of.pop(request_id)
        self._queues[tenant].remove(request_id)
        if not len(self._queues[tenant]):
            del self._queues[tenant]

    def quantum(self, waiting: Waiting) -> int | None:
        return None

    def on_sent(self, waiting: Waiting) -> None:
        self._charge(waiting.request.tenant, _cost_of(waiting))

    def on_put_back(self, waiting: Waiting) -> None:
        self._charge(waiting.request.tenant, -_cost_of(waiting))

    def on_ended(self, tenant: str, predicted: float, actual: int) -> None:
        self._charge(tenant, OUTPUT_WEIGHT * (actual - predicted))

    def had(self, tenant: str) -> float:
        """What a tenant has been charged, by its weight."""
        return self._had.get(tenant, 0.0)

    def _charge(self, tenant: str, tokens: float) -> None:
        self._had[tenant] = self._had.get(tenant, 0.0) + tokens / self._weights.get(tenant, 1.0)


ORDERS: Final[dict[str, Callable[[], OrderPolicy]]] = {
    "fcfs": Fcfs,
    "priority": Priority,
    "sjf": Sjf,
    "srpt": Srpt,
    "mlfq": Mlfq,
    "edf": Edf,
    "fair": Fair,
    "prefix_first": PrefixFirst,
}


def _cost_of(waiting: Waiting) -> float:
    return waiting.request.num_tokens + OUTPUT_WEIGHT * waiting.remaining


def _work(num_prompt_tokens: int, num_new_tokens: float) -> float:
    """In tokens of an answer."""
    return PROMPT_WORK * num_prompt_tokens + num_new_tokens


def _whole_length(waiting: Waiting) -> float:
    return waiting.remaining + waiting.num_generated


def _longest(waiting: Waiting) -> int:
    """Tokens of the choice that has most."""
    return max((len(choice.emitted) // 4 for choice in waiting.request.choices), default=0)


def _up_to(level: int) -> int:
    """Tokens that a request may have used up on this level and those above."""
    return FIRST_QUANTUM << level


def _level_of(waiting: Waiting) -> int:
    used = waiting.request.num_prompt_tokens + _longest(waiting)
    # A prompt as long as a quantum leaves nothing of it.
    return min(NUM_LEVELS - 1, next((i for i in range(NUM_LEVELS) if used < _up_to(i)), NUM_LEVELS - 1))
