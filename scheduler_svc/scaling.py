"""What a scheduler says about the number of workers: its own demand, and, if it decides, the target. Pure.

Requests go to any scheduler, so each tells all others what waits with it. The one with the lowest name adds all up and
asks the policy; when it goes, the next one begins with the workers that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from scheduler_svc.policy.scale import SCALES, Loss, ScaleLimits, ScalePolicy, ScaleView, Target, order_by_loss
from scheduler_svc.totals import Totals
from weft.errors import InvalidRequest, SettingsError
from weft.messages import Ended, ScaleAdvice, TokenizedRequest

NO_PROMISE: Final = "slo needs the promise of a first token that it is to keep, as by --slo ttft=2"
# A worker's pace is learnt from about so many seconds back.
MEMORY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What a scheduler knows of one model."""

    model: str
    num_waiting: int  # requests in its backlog
    num_waiting_tokens: int
    ready: Totals  # its ready workers, as they are now
    num_starting: int  # workers
    count_only_blocks: Callable[[str], int]  # of a worker, those that nobody else has


@dataclass(slots=True)
class _Pace:
    """What workers end in a second when they are full, by Little's law: their places over the time that one is taken.

    An answer takes longer in a full worker, so this says too much while they are half empty, and is right when it
    matters.
    """

    num_ended: float = 0.0
    taken_s: float = 0.0  # places times seconds
    num_new: int = 0  # ended since `now`
    now: float | None = None

    def observe(self, num_running: int, now: float) -> None:
        """Mutates self."""
        if self.now is not None:
            elapsed = now - self.now
            kept = max(0.0, 1 - elapsed / MEMORY_S)
            self.num_ended = kept * self.num_ended + self.num_new
            self.taken_s = kept * self.taken_s + num_running * elapsed
            self.num_new = 0
        self.now = now

    def per_s(self, max_num_seqs: int) -> float:
        return max_num_seqs * self.num_ended / self.taken_s if self.taken_s else 0.0


@dataclass(slots=True)
class _Model:
    policy: ScalePolicy
    num_arrived: int = 0
    pace: _Pace = field(default_factory=_Pace)
    told: dict[str, ScaleAdvice] = field(default_factory=dict)  # by the other schedulers
    target: int | None = None  # the last one given
    # Of the last workers that were there: what the next ones will be like.
    max_num_seqs: int = 0
    prefill_tokens_per_s: float = 0.0


class Scaling:
    """One scheduler's part in scaling all models."""

    def __init__(self, scheduler: str, policy: str, limits: ScaleLimits, ttft_s: float = math.inf) -> None:
        """`ttft_s`: the strictest promise of a first token, which the policy `slo` keeps.

        Raises:
            SettingsError: the policy is `slo`, and nothing is promised.
        """
        if policy == "slo" and ttft_s == math.inf:
            raise SettingsError(f"scale: {NO_PROMISE}")
        self._policy = policy
        self._scheduler = scheduler
        self._limits = limits
        self._ttft_s = ttft_s
        self._models: dict[str, _Model] = {}

    def switch(self, policy: str, model: str = "") -> None:
        """Decide by another policy for one model or all; it begins with the workers that are there. Mutates self."""
        if not model:
            self._policy = policy
        for known in [self._model(model)] if model else self._models.values():
            known.policy = SCALES[policy](self._limits)

    @property
    def can_keep_promises(self) -> bool:
        """Whether there is one that the policy `slo` could keep."""
        return self._ttft_s < math.inf

    def policy_of(self, model: str = "") -> str:
        """By name; of models of which nothing else was said without one."""
        return self._models[model].policy.name if model in self._models else self._policy

    def on_request(self, request: TokenizedRequest) -> bool:
        """A request arrives; True if no worker is meant to be there, so that advice should not wait. Mutates self."""
        model = self._model(request.model)
        if not request.epoch:
            model.num_arrived += 1
        return not model.target

    def on_ended(self, ended: Ended) -> None:
        """Mutates self."""
        self._model(ended.model).pace.num_new += len(ended.request_ids)

    def on_advice(self, advice: ScaleAdvice) -> bool:
        """Another scheduler tells what waits with it; True if our own advice should not wait. Mutates self."""
        if advice.scheduler == self._scheduler:
            return False
        model = self._model(advice.model)
        model.told[advice.scheduler] = advice
        return bool(advice.num_waiting) and model.target == 0

    def advise(self, demands: Iterable[Demand], schedulers: Collection[str], now: float) -> list[ScaleAdvice]:
        """What to say now. `schedulers`: those that are ready, this one among them. Mutates self."""
        decides = self._scheduler == min(schedulers)
        return [self._advise(demand, schedulers, decides, now) for demand in demands]

    def _advise(self, demand: Demand, schedulers: Collection[str], decides: bool, now: float) -> ScaleAdvice:
        model = self._model(demand.model)
        model.told = {name: advice for name, advice in model.told.items() if name in schedulers}
        view = self._view(demand, model, now)
        own = (self._scheduler, demand.model, demand.num_waiting, demand.num_waiting_tokens, model.num_arrived)
        if not decides:
            model.target = None
            return ScaleAdvice(*own)
        target = model.policy.decide(view)
        model.target = target.num_workers
        return ScaleAdvice(*own, target.num_workers, target.reason, _drain_order(demand, target))

    def _view(self, demand: Demand, model: _Model, now: float) -> ScaleView:
        ready, others = demand.ready.sums, model.told.values()
        model.pace.observe(ready.load, now)
        model.max_num_seqs = demand.ready.max_num_seqs or model.max_num_seqs
        if ready.num_measured:
            model.prefill_tokens_per_s = ready.prefill_tokens_per_s / ready.num_measured
        return ScaleView(
            now=now,
            num_ready=len(demand.ready),
            num_starting=demand.num_starting,
            num_waiting=demand.num_waiting + sum(advice.num_waiting for advice in others),
            num_waiting_tokens=demand.num_waiting_tokens
            + sum(advice.num_waiting_tokens for advice in others)
            + ready.waiting_tokens,
            num_running=ready.load,
            num_arrived=model.num_arrived + sum(advice.num_arrived for advice in others),
            max_num_seqs=model.max_num_seqs,
            prefill_tokens_per_s=model.prefill_tokens_per_s,
            requests_per_s=model.pace.per_s(model.max_num_seqs),
            ttft_s=self._ttft_s,
        )

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            self._models[name] = _Model(SCALES[self._policy](self._limits))
        return self._models[name]


def check_scale(scaling: Scaling | None, policy: str | None) -> None:
    """Raises InvalidRequest if it cannot be switched to this policy."""
    if policy is None:
        return
    if scaling is None:
        raise InvalidRequest("scaling is off: it is switched on at the start, by --scale", param="policies")
    if policy not in SCALES:
        raise InvalidRequest(f"no scale policy {policy!r}; there are {', '.join(SCALES)}", param="policies")
    if policy == "slo" and not scaling.can_keep_promises:
        raise InvalidRequest(NO_PROMISE, param="policies")


def _drain_order(demand: Demand, target: Target) -> list[str]:
    if len(demand.ready) + demand.num_starting <= target.num_workers:
        return []
    return order_by_loss(
        Loss(worker.name, worker.load, demand.count_only_blocks(worker.name)) for worker in demand.ready
    )
