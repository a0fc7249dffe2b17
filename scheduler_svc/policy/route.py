"""Where: which of the workers with room for a request gets it.

A policy sees only workers that are ready, serve the model and have room, so no rule here can overload one. None looks
at every worker: the pool keeps them in order, and workers that hold equally much of a prompt differ in their load only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

import msgspec
from msgspec.structs import replace

from scheduler_svc.block_index import NO_MATCH, Match
from scheduler_svc.cost_model import CostModel, Transfer
from scheduler_svc.pool import Order, Pool
from scheduler_svc.workers import Rank, Worker
from weft.hashing import BLOCK_SIZE
from weft.limits import MAX_SCORES
from weft.messages import Decision, Score


class Arrival(msgspec.Struct, frozen=True):
    """What a policy knows of the request to be placed."""

    num_tokens: int  # of the prompt, and what was generated before
    num_blocks: int  # full ones of the prompt
    remaining: float  # tokens that it is predicted to generate
    now: float
    match: Match = NO_MATCH  # what each candidate holds of the blocks; empty unless the policy `uses_prefix`
    is_decode: bool = False  # its prompt was computed elsewhere


class Chance(Protocol):
    """What policies need of a `random.Random`."""

    def randrange(self, stop: int, /) -> int: ...

    def sample(self, population: range, k: int, /) -> list[int]: ...


class RoutePolicy(Protocol):
    """Chooses among the workers of a pool, which is never empty.

    Mutates: self and random state only.
    """

    name: str
    uses_prefix: bool

    def decide(self, arrival: Arrival, pool: Pool) -> Decision: ...


class LeastLoaded:
    """The worker with the fewest sequences, held or on their way, for its size.

    Ties: fewest tokens waiting to be prefilled, then the one longest not used.
    Invariant: no other candidate has a lower load fraction. Source: greedy least load, as in every load balancer.
    """

    name = "least_loaded"
    uses_prefix = False

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        return _decision(self.name, "least load", (pool.least(),), arrival, pool, pool.by_rank)


class RoundRobin:
    """The candidate longest not used.

    Invariant: while the candidates stay the same, all get a request before one gets a second. Source: folklore.
    """

    name = "round_robin"
    uses_prefix = False

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        return _decision(self.name, "longest unused", (pool.by_use.first(),), arrival, pool, pool.by_use)


class Random:
    """Any candidate, each as likely. The baseline of every comparison. Source: folklore."""

    name = "random"
    uses_prefix = False

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        chosen = pool.by_rank[self._chance.randrange(len(pool))]
        return _decision(self.name, "by chance", (chosen,), arrival, pool, pool.by_rank)


class PowerOfTwo:
    """Of two candidates by chance the less loaded one.

    Invariant: with two or more candidates the most loaded one is never chosen. Source: Mitzenmacher 2001; TetriInfer
    for its decode workers.
    """

    name = "power_of_two"
    uses_prefix = False

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        # The pool is in the order of load, so the lower place is the lesser load.
        places = sorted(self._chance.sample(range(len(pool)), min(2, len(pool))))
        both = [pool.by_rank[place] for place in places]
        return _decision(self.name, "better of two", both, arrival, pool, pool.by_rank)


class PrefixAware:
    """The worker that holds the longest prefix of the prompt, unless that would unbalance the load.

    1. If max load − min load > `balance_abs` and max load > `balance_rel` × min load over the candidates: the least
       loaded one. Loads are sequences held or on their way.
    2. Else, if the longest match in full blocks is at least `cache_threshold` of the prompt's full blocks: a worker
       with that match; among several, the least loaded one.
    3. Else the least loaded one.
    Invariant: rule 2 never picks a worker while another candidate holds more of the prompt.
    Source: the cache-aware policy of SGLang's router (sgl-router, cache_aware), whose thresholds were 0.3-0.5, 64 and
    1.5. Differences: matches are known from the workers' events instead of guessed from past routing, rule 3 takes
    the least load instead of the smallest tree, and `balance_abs` is smaller since late binding keeps loads small.
    """

    name = "prefix_aware"
    uses_prefix = True

    def __init__(self, *, cache_threshold: float = 0.3, balance_abs: int = 16, balance_rel: float = 1.5) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        match = arrival.match
        if not match.longest or match.longest < self._cache_threshold * arrival.num_blocks:
            chosen, rule = pool.least(), "short match"
        elif _is_unbalanced(pool, self._balance_abs, self._balance_rel):
            chosen, rule = pool.least(), "unbalanced"
        else:
            chosen, rule = pool.by_rank.first(match.holders), "longest match"
        return _decision(self.name, rule, (chosen,), arrival, pool, pool.by_rank)


class LeastPrefill:
    """The worker that has the fewest tokens to compute before the first one of this request comes.

    These are what waits there to be prefilled, and what of the prompt is not cached. Two workers are looked at: the one
    with the shortest queue, and of those that hold most of the prompt the one with the shortest queue, which is taken
    where both are as good. Only the first is where the match is short, or while loads in sequences are unbalanced, both
    as `prefix_aware` has it: for the few tokens that it saves, a request should not join those that decode already.
    Invariant: of those looked at, none has less to compute before. Source: join the shortest queue (Winston 1977), in
    tokens to prefill and with locality. It places as well as `min_ttft`, which has an estimate for each depth of match
    and takes half as long again over 1,000 workers (2026).
    """

    name = "least_prefill"
    uses_prefix = True

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs: int = 16,
        balance_rel: float = 1.5,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs
        self._balance_rel = balance_rel
        self._block_size = block_size

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        order, match = pool.by_queue, arrival.match
        best, rule = [order.first()], "shortest queue"
        if self._is_worth_it(arrival, pool):
            best.append(order.first(match.holders))
            num_saved = (match.longest - match.depth(best[0].bit)) * self._block_size
            if best[1].waiting_tokens <= best[0].waiting_tokens + num_saved:
                best, rule = best[::-1], "longest match"
        return _decision(self.name, rule, best, arrival, pool, order)

    def _is_worth_it(self, arrival: Arrival, pool: Pool) -> bool:
        """Whether what is cached may decide."""
        longest = arrival.match.longest
        if not longest or longest < self._cache_threshold * arrival.num_blocks:
            return False
        return not _is_unbalanced(pool, self._balance_abs, self._balance_rel)


class MinTtft:
    """The worker where the first token is expected soonest: transfer + queue + prefill.

    Of the workers that hold equally much of the prompt, the one with the shortest queue is looked at; where the longest
    prefix is more than `balance` times what a worker holds, it may get it from the cache service (transfer) instead of
    computing it, whichever is faster, and so hot prefixes spread to where there is room. Where there are workers that
    only prefill, these are looked at; a request whose prompt was computed goes to the least loaded one that decodes.
    Invariant: among workers of equal speed no other one's estimate is lower.
    Source: Mooncake (FAST '25), algorithm 1; the threshold is a ratio, as section 4.2 says.
    """

    name = "min_ttft"
    uses_prefix = True

    def __init__(
        self,
        cost: CostModel,
        *,
        balance: float = 2.0,
        transfer: Transfer | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self._cost = cost
        self._block_size = block_size
        self._balance = balance
        self._transfer = transfer or Transfer()

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        if arrival.is_decode:
            if decode := pool.of_role("decode"):
                inside, best = _within(arrival, decode), decode.least()
                return _decision(self.name, "decode: least load", (best,), inside, decode, decode.by_rank)
        elif prefill := pool.of_role("prefill"):
            return replace(self._soonest(_within(arrival, prefill), prefill), stop_after=1)
        return self._soonest(arrival, pool)

    def _soonest(self, arrival: Arrival, pool: Pool) -> Decision:
        best: tuple[float, Worker, str] | None = None
        seen: list[Worker] = []
        shortest_s = self._cost.prefill_s(pool.by_queue.first().waiting_tokens)
        for depth, mask in arrival.match.groups(pool.mask):
            own_s, rule = self._first_token_s(arrival, depth)
            # With the shortest queue of all it would still be later.
            if best is not None and own_s + shortest_s >= best[0]:
                continue
            worker = pool.by_queue.first(mask)
            seen.append(worker)
            seconds = own_s + self._cost.prefill_s(worker.waiting_tokens)
            if best is None or seconds < best[0]:
                best = seconds, worker, rule
        assert best is not None
        seconds, worker, rule = best
        found = _decision(self.name, rule, [worker, *seen], arrival, pool, pool.by_queue)
        return replace(found, expected_ttft_s=seconds)

    def _first_token_s(self, arrival: Arrival, depth: int) -> tuple[float, str]:
        longest, block_s = arrival.match.longest, self._transfer.block_s
        computed = self._cost.prefill_s(arrival.num_tokens, depth * self._block_size)
        if block_s is None or longest <= self._balance * depth:
            return computed, "compute"
        fetched = (longest - depth) * block_s
        fetched += self._cost.prefill_s(arrival.num_tokens, longest * self._block_size)
        return (fetched, "fetch") if fetched < computed else (computed, "compute")


class PrebleE2:
    """Exploit where more of the prompt is cached than is not, else explore where it costs least.

    Exploit: of the workers with the longest match the one with the least load. Explore: the least cost, which is the
    work given to the worker in the last `window_s` seconds, and the prefill that this request needs there. A worker
    with more than twice the least work of others does not get more of it by its cache.
    Invariant: with no match in any worker, the one with the least recent work is chosen.
    Source: Preble's E2 (Srivatsa et al. 2025, ICLR, algorithm 1) without its cost of eviction, which needs the hit
    rates of single blocks.
    """

    name = "preble_e2"
    uses_prefix = True

    def __init__(
        self, cost: CostModel, *, window_s: float = 180.0, imbalance: float = 2.0, block_size: int = BLOCK_SIZE
    ) -> None:
        self._cost = cost
        self._block_size = block_size
        self._window_s = window_s
        self._imbalance = imbalance
        self._given: deque[tuple[float, str, float]] = deque()  # (when, worker, seconds of work)
        self._recent: dict[str, float] = {}

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        self._forget(arrival.now - self._window_s, pool)
        # The least work, and of several without any the least load.
        by_work = pool.by_own(self._by_work)
        depth, idlest = arrival.match.longest, by_work.first()
        place, rule, seen = 0, "explore", [idlest]
        if depth and 2 * depth * self._block_size >= arrival.num_tokens:
            holder = pool.by_rank.first(arrival.match.holders)
            seen.append(holder)
            if self._work(holder) <= self._imbalance * self._work(idlest) or holder.load <= idlest.load:
                place, rule = 1, "exploit"
        if rule == "explore":
            seen += self._nearest(arrival, pool)
        depths = arrival.match.depths([worker.bit for worker in seen])
        prefills = [self._cost.prefill_s(arrival.num_tokens, depth * self._block_size) for depth in depths]
        if rule == "explore":
            costs = [self._work(worker) + prefill_s for worker, prefill_s in zip(seen, prefills, strict=True)]
            place = costs.index(min(costs))
        chosen = seen[place]
        work = prefills[place] + arrival.remaining * self._cost.decode_s(1, arrival.num_tokens)
        self._given.append((arrival.now, chosen.name, work))
        self._add_work(chosen.name, work)
        by_work.put(chosen)
        return _decision(self.name, rule, [chosen, *seen], arrival, pool, by_work)

    def _nearest(self, arrival: Arrival, pool: Pool) -> Iterator[Worker]:
        """Some that hold most of the prompt: the least loaded ones of the two longest matches."""
        for _, mask in islice(arrival.match.groups(arrival.match.levels[0][1] if arrival.match.levels else 0), 2):
            yield from islice(pool.by_rank.within(mask), MAX_SCORES)

    def _work(self, worker: Worker) -> float:
        return self._recent.get(worker.name, 0.0)

    def _by_work(self, worker: Worker) -> tuple[float, Rank]:
        return self._work(worker), worker.rank

    def _add_work(self, name: str, seconds: float) -> None:
        after = self._recent.pop(name, 0.0) + seconds
        # Less is left of nothing by rounding.
        if after > 1e-9:
            self._recent[name] = after

    def _forget(self, before: float, pool: Pool) -> None:
        while self._given and self._given[0][0] < before:
            _, name, work = self._given.popleft()
            self._add_work(name, -work)
            if name in pool:
                pool.by_own(self._by_work).put(pool[name])


# Cells of the heat map: prompts from 2^k * 128 tokens on, and answers from 2^k / 16 times the prompt on.
Heatmap = Mapping[tuple[int, int], float]
# Where none was measured: prompts of 1,024 tokens and more with answers of less than a quarter of that gain, as
# DeepServe (ATC '25) says of its own map in words.
ASSUMED_HEATMAP: Final[Heatmap] = {(length, share): 0.1 for length in range(4, 32) for share in range(3)}


class PdHeatmap:
    """By phase, then by prefix or load.

    A heat map says for prompts of about this length and answers of about this share of it how much faster a request
    ends when one worker prefills and another decodes. Where that is a gain, and there are workers of both roles, it
    goes to one that prefills, hands it back after its first token, and then goes to one that decodes. Load overrides
    the map either way: where one kind of workers has more than `override` times the load of the other, the other one
    gets the request. Within the workers of its phase, it
    follows the longest match while their load is balanced, and the least load otherwise.
    A role says what a worker is for, not what it can do: where none that decodes has room, one that only prefills does,
    where requests of Mooncake and DeepServe wait. Mean time to the end of 800 requests of Azure's code and chat in turn
    on eight simulated a100, this way and by waiting beside the backlog: two of eight decode, 10 requests/s, 11 s and
    17 s; the same at 16/s, 16 s and 57 s; four of eight decode 16 sequences each, 16/s, 11 s and 14 s, and 64 each, no
    difference. Only where four of eight do both is waiting no worse: 11 s and 11 s at 16/s, 18 s and 15 s at 22/s.
    Invariant: a request whose prompt was computed never goes to a worker that only prefills while another has room.
    Source: DeepServe (ATC '25), algorithm 1, whose loss at very high load (figure 8) the override mends.
    """

    name = "pd_heatmap"
    uses_prefix = True

    def __init__(self, heatmap: Heatmap, *, override: float = 1.5) -> None:
        self._heatmap = heatmap
        self._override = override
        self._by_prefix = PrefixAware()

    def decide(self, arrival: Arrival, pool: Pool) -> Decision:
        prefill, decode, both = (pool.of_role(role) for role in ("prefill", "decode", "both"))
        if arrival.is_decode:
            return self._place(arrival, decode or both or pool, "decode", None)
        if prefill and (not both or self._is_worth_it(arrival, (prefill, decode), both)):
            return self._place(arrival, prefill, "prefill", 1)
        return self._place(arrival, both or decode or pool, "both", None)

    def _is_worth_it(self, arrival: Arrival, split: tuple[Pool, Pool], whole: Pool) -> bool:
        # A pool without workers has no room.
        apart = max(pool.least().load_fraction if pool else float("inf") for pool in split)
        together = whole.least().load_fraction
        if self._heatmap.get(heatmap_cell(arrival.num_tokens, arrival.remaining), 0.0) > 0:
            return not apart or apart <= self._override * together
        return bool(together) and together > self._override * apart

    def _place(self, arrival: Arrival, pool: Pool, role: str, stop_after: int | None) -> Decision:
        found = self._by_prefix.decide(_within(arrival, pool), pool)
        return replace(found, policy=self.name, rule=f"{role}: {found.rule}", stop_after=stop_after)


def heatmap_cell(num_tokens: int, remaining: float) -> tuple[int, int]:
    """The cell of a prompt's length and a predicted answer's."""
    return (num_tokens // 128).bit_length(), int(16 * remaining / max(1, num_tokens)).bit_length()


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What policies are made with."""

    chance: Chance
    cost: CostModel
    transfer: Transfer = field(default_factory=Transfer)
    heatmap: Heatmap = field(default_factory=dict)
    block_size: int = BLOCK_SIZE  # tokens
    split_override: float = 1.5  # of `PdHeatmap`


ROUTES: Final[dict[str, Callable[[RouteContext], RoutePolicy]]] = {
    "random": lambda context: Random(context.chance),
    "round_robin": lambda context: RoundRobin(),
    "least_loaded": lambda context: LeastLoaded(),
    "power_of_two": lambda context: PowerOfTwo(context.chance),
    "prefix_aware": lambda context: PrefixAware(),
    "least_prefill": lambda context: LeastPrefill(block_size=context.block_size),
    "min_ttft": lambda context: MinTtft(context.cost, transfer=context.transfer, block_size=context.block_size),
    "pd_heatmap": lambda context: PdHeatmap(context.heatmap, override=context.split_override),
    "preble_e2": lambda context: PrebleE2(context.cost, block_size=context.block_size),
}


def _within(arrival: Arrival, pool: Pool) -> Arrival:
    """The same where only some of the workers are candidates."""
    return replace(arrival, match=arrival.match.within(pool.mask))


def _is_unbalanced(pool: Pool, balance_abs: int, balance_rel: float) -> bool:
    least, most = pool.loads()
    return most - least > balance_abs and most > balance_rel * least


def _decision(policy: str, rule: str, best: Sequence[Worker], arrival: Arrival, pool: Pool, order: Order) -> Decision:
    """For the first of those that the policy looked at. `order`: of the candidates, by which it looks at them."""
    return Decision(
        worker=best[0].name,
        policy=policy,
        rule=rule,
        num_candidates=len(pool),
        least_load=pool.loads()[0],
        num_prompt_blocks=arrival.num_blocks,
        scores=_scores(best, arrival.match, order),
    )


def _scores(best: Sequence[Worker], match: Match, order: Order) -> tuple[Score, ...]:
    """Those that were looked at, one that holds most of the prompt if none of them does, then the first in order."""
    shown = {worker.bit: worker for worker in best[: MAX_SCORES - 1]}
    if match.longest and not any(match.holders >> bit & 1 for bit in shown):
        holder = order.any_of(match.holders)
        shown[holder.bit] = holder
    for worker in order:
        if len(shown) >= MAX_SCORES:
            break
        shown[worker.bit] = worker
    depths = match.depths(shown)
    return tuple(
        [
            Score(worker.name, worker.load, worker.waiting_tokens, depth)
            for worker, depth in zip(shown.values(), depths, strict=True)
        ]
    )
