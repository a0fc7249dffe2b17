"""Where: which of the workers with room for a request gets it.

A policy sees only workers that are ready, serve the model and have room, so no rule here can overload one.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final, Protocol

from scheduler_svc.actions import Decision, Score
from scheduler_svc.block_index import Match
from scheduler_svc.workers import Worker

# How many candidates a decision lists.
MAX_SCORES: Final = 8
_rank = attrgetter("rank")


class RoutePolicy(Protocol):
    """Chooses among `candidates`, which are never empty.

    `match` says how many leading blocks of the prompt, out of `num_blocks`, each of them holds; it is empty unless
    the policy has `uses_prefix`. All are computed in a few passes over the candidates, which may be a thousand.
    """

    name: str
    uses_prefix: bool

    def decide(self, candidates: Sequence[Worker], match: Match, num_blocks: int) -> Decision: ...


class LeastLoaded:
    """The worker with the fewest sequences, held or on their way, for its size.

    Ties: fewest tokens waiting to be prefilled, then the one longest not used.
    Invariant: no other candidate has a lower load fraction. Source: greedy least load, as in every load balancer.
    """

    name = "least_loaded"
    uses_prefix = False

    def decide(self, candidates: Sequence[Worker], match: Match, num_blocks: int) -> Decision:
        return _decision(self.name, "least load", min(candidates, key=_rank), candidates, match, num_blocks)


class RoundRobin:
    """The candidate longest not used.

    Invariant: while the candidates stay the same, all get a request before one gets a second. Source: folklore.
    """

    name = "round_robin"
    uses_prefix = False

    def decide(self, candidates: Sequence[Worker], match: Match, num_blocks: int) -> Decision:
        worker = min(candidates, key=lambda worker: (worker.last_used, worker.name))
        return _decision(self.name, "longest unused", worker, candidates, match, num_blocks)


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

    def decide(self, candidates: Sequence[Worker], match: Match, num_blocks: int) -> Decision:
        if not match.longest or match.longest < self._cache_threshold * num_blocks:
            chosen, rule = min(candidates, key=_rank), "short match"
        elif self._is_unbalanced(candidates):
            chosen, rule = min(candidates, key=_rank), "unbalanced"
        else:
            chosen, rule = min(_holders(candidates, match), key=_rank), "longest match"
        return _decision(self.name, rule, chosen, candidates, match, num_blocks)

    def _is_unbalanced(self, candidates: Sequence[Worker]) -> bool:
        loads = [worker.load for worker in candidates]
        least, most = min(loads), max(loads)
        return most - least > self._balance_abs and most > self._balance_rel * least


ROUTES: Final[dict[str, type[LeastLoaded] | type[RoundRobin] | type[PrefixAware]]] = {
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
    "prefix_aware": PrefixAware,
}


def _decision(
    policy: str,
    rule: str,
    chosen: Worker,
    candidates: Sequence[Worker],
    match: Match,
    num_blocks: int,
) -> Decision:
    return Decision(
        worker=chosen.name,
        policy=policy,
        rule=rule,
        num_candidates=len(candidates),
        num_prompt_blocks=num_blocks,
        scores=_scores(chosen, candidates, match),
    )


def _holders(candidates: Sequence[Worker], match: Match) -> list[Worker]:
    bits = match.holder_bits()
    return [worker for worker in candidates if worker.bit in bits]


def _scores(chosen: Worker, candidates: Sequence[Worker], match: Match) -> tuple[Score, ...]:
    """The chosen one first, then those that hold most of the prompt, then the first of the others."""
    holders = _holders(candidates, match) if match.longest else []
    nearest = (chosen, *holders[:MAX_SCORES], *candidates[:MAX_SCORES])
    shown = list({worker.name: worker for worker in nearest}.values())[:MAX_SCORES]
    return tuple(Score(worker.name, worker.load, worker.waiting_tokens, match.depth(worker.bit)) for worker in shown)
