"""How many: the number of workers that a model should have, and which of them to let go of first.

A policy says how many workers the load needs; `Band` makes a target of it. The target is absolute, so whoever carries
it out may hear it twice, or miss it once. Sources: Kubernetes' horizontal pod autoscaler (target utilization,
tolerance, stabilization window), Knative (to zero after an idle time, from zero at the first request).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from weft.errors import SettingsError

# Workers are added when more than HIGH of what there is would be in use, and ended when so few would do that at most
# LOW of them were. The load must fall by LOW / HIGH before what was added is ended: that is the hysteresis.
HIGH: Final = 0.8
LOW: Final = 0.5
# So long must the load have been small before a worker is ended.
SHRINK_AFTER_S: Final = 30.0
# Tokens that wait to be prefilled, for which one worker is enough.
TOKENS_PER_WORKER: Final = 8192
# How far ahead `predictive` looks: what a worker takes to start, and to be worth it.
HORIZON_S: Final = 15.0
# Weights of the newest second in Holt's level and in his trend.
LEVEL_WEIGHT: Final = 0.3
TREND_WEIGHT: Final = 0.1


@dataclass(frozen=True, slots=True)
class ScaleLimits:
    """What the operator allows; without a minimum there are no workers after `idle_s` without a request."""

    min_workers: int = 0
    max_workers: int = 1
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        """Raises SettingsError if there is no number between the bounds."""
        if self.min_workers > self.max_workers:
            raise SettingsError(f"min_workers: {self.min_workers} is more than max_workers, {self.max_workers}")


@dataclass(frozen=True, slots=True)
class ScaleView:
    """What the schedulers of a model see, all together."""

    now: float
    num_ready: int = 0  # workers
    num_starting: int = 0
    num_waiting: int = 0  # requests in backlogs
    num_waiting_tokens: int = 0  # to be prefilled: in backlogs, on the way and in the workers
    num_running: int = 0  # sequences that the workers hold, or that are on their way there
    num_arrived: int = 0  # requests ever
    max_num_seqs: int = 0  # sequences that a worker holds; 0 = no worker has said yet
    prefill_tokens_per_s: float = 0.0  # of one worker; 0 = not measured yet
    requests_per_s: float = 0.0  # that one worker ends when it is full; 0 = not measured yet
    ttft_s: float = math.inf  # the strictest promise of a first token

    @property
    def seats_needed(self) -> float:
        """Workers that hold all there is, if each were full; 0 as long as nobody knows."""
        return (self.num_waiting + self.num_running) / self.max_num_seqs if self.max_num_seqs else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """How many workers there should be, ready and starting, and why."""

    num_workers: int
    reason: str


class ScalePolicy(Protocol):
    """Says how many workers a model should have. It remembers; ask it about twice a second."""

    name: str

    def decide(self, view: ScaleView) -> Target: ...


class Band:
    """A target that follows a need without flapping, within the limits, to zero and from zero.

    Rule: grow at once to what keeps at most HIGH of the target in use; shrink, after SHRINK_AFTER_S in which fewer
    would have done all the time, to the most that were needed meanwhile at LOW. Nothing for `idle_s`: none. Anything
    that waits: one at least.
    Invariant: within the limits, but for none where the minimum is none; a need that stays within a factor of
    HIGH / LOW moves the target in one direction at most; never none while something waits or runs.
    Source: the pod autoscaler's tolerance and stabilization window, as a band.
    """

    def __init__(self, limits: ScaleLimits) -> None:
        self._limits = limits
        self._target: int | None = None
        self._busy_at: float | None = None
        self._num_arrived = 0
        self._low_since: float | None = None
        self._low_most = 0  # workers that would have done since then

    def settle(self, view: ScaleView, need: float, why: str) -> Target:
        """The target for a need in workers, as a fraction. Mutates self."""
        if self._target is None:
            self._busy_at, self._num_arrived = view.now, view.num_arrived
            self._target = self._clamp(view.num_ready + view.num_starting)
        before = self._target
        if view.num_waiting or view.num_running or view.num_arrived != self._num_arrived:
            self._busy_at, self._num_arrived = view.now, view.num_arrived
            return self._follow(view.now, max(need, 0.0), why, max(1, before))
        assert self._busy_at is not None
        idle_s = view.now - self._busy_at
        if not self._limits.min_workers and (not before or idle_s >= self._limits.idle_s):
            self._target, self._low_since = 0, None
            return Target(0, f"nothing to do for {idle_s:.0f} s")
        return self._follow(view.now, max(need, 0.0), why, before)

    def _follow(self, now: float, need: float, why: str, before: int) -> Target:
        wanted, enough = self._bounded(need / HIGH), self._bounded(need / LOW)
        self._target = self._clamp(before)
        if wanted > before:
            self._low_since, self._target = None, wanted
        elif enough >= before:
            self._low_since = None
        elif self._low_since is None:
            self._low_since, self._low_most = now, enough
        else:
            self._low_most = max(self._low_most, enough)
            if now - self._low_since >= SHRINK_AFTER_S:
                self._target, self._low_since = self._low_most, None
        return Target(self._target, f"{why}: {need:.2f} workers' work")

    def _bounded(self, workers: float) -> int:
        """At least so many, as a whole number within the limits; one at least. Rounding errors add none."""
        return max(1, self._clamp(math.ceil(min(workers, self._limits.max_workers) - 1e-9)))

    def _clamp(self, workers: int) -> int:
        return min(max(workers, self._limits.min_workers), self._limits.max_workers)


class Fixed:
    """Always all of them.

    Rule: `max_workers` as long as there is anything to do; none after `idle_s` without, if the minimum is none.
    Invariant: the target is the maximum or none.
    Source: the baseline, a static deployment.
    """

    name = "fixed"

    def __init__(self, limits: ScaleLimits) -> None:
        self._max_workers = limits.max_workers
        self._band = Band(limits)

    def decide(self, view: ScaleView) -> Target:
        found = self._band.settle(view, float(self._max_workers), "all there may be")
        return Target(self._max_workers, "all there may be") if found.num_workers else found


class Queue:
    """As many as hold what is there, and prefill what waits.

    Rule: the need is the larger of sequences (waiting and running) over what a worker holds, and of tokens to be
    prefilled over TOKENS_PER_WORKER.
    Invariant: that of `Band`; the need never falls when a request is added.
    Source: KEDA's and Knative's scaling by queue length and concurrency.
    """

    name = "queue"

    def __init__(self, limits: ScaleLimits) -> None:
        self._band = Band(limits)

    def decide(self, view: ScaleView) -> Target:
        by_tokens = view.num_waiting_tokens / TOKENS_PER_WORKER
        why = f"{view.num_waiting} wait, {view.num_running} run, {view.num_waiting_tokens} tokens to prefill"
        return self._band.settle(view, max(view.seats_needed, by_tokens), why)


class Slo:
    """As many as bring the last one that waits to its first token within the strictest objective of any class.

    Rule: with n workers the last in the queue waits for the prefill of all tokens before it, tokens / (n rate), and,
    if nothing has room for it, until as many requests have ended as wait, waiting / (n requests_per_s). The need is
    the n that makes the longer of both the objective. Until rates are measured it is the number of sequences over
    what a worker holds.
    Invariant: that of `Band`; the predicted TTFT of its target is at most the objective, unless the maximum is reached.
    Source: Mooncake's TTFT estimate (queue and prefill; Qin et al. 2024, section 5) solved for the number of instances.
    """

    name = "slo"

    def __init__(self, limits: ScaleLimits) -> None:
        self._band = Band(limits)

    def decide(self, view: ScaleView) -> Target:
        if not view.prefill_tokens_per_s:
            return self._band.settle(view, view.seats_needed, "no rate is measured yet")
        prefill = view.num_waiting_tokens / view.prefill_tokens_per_s
        queue = view.num_waiting / view.requests_per_s if view.requests_per_s else 0.0
        work_s = max(prefill, queue)
        need = work_s / view.ttft_s
        if view.num_waiting and not view.requests_per_s:
            need = max(need, view.seats_needed)
        ttft_s = work_s / max(1, view.num_ready)
        return self._band.settle(view, need, f"TTFT {ttft_s:.2f} s predicted, {view.ttft_s:g} s promised")


class Holt:
    """The rate of arrivals, and how it changes: Holt's linear exponential smoothing (1957), a second at a time."""

    def __init__(self) -> None:
        self.level = 0.0  # requests a second
        self.trend = 0.0  # change of that in a second
        self._num_arrived: int | None = None
        self._since = 0.0

    def observe(self, num_arrived: int, now: float) -> None:
        """Take in how many have ever arrived. Mutates self."""
        if self._num_arrived is None or num_arrived < self._num_arrived:
            self._num_arrived, self._since = num_arrived, now
            return
        elapsed = now - self._since
        if elapsed < 1.0:
            return
        rate = (num_arrived - self._num_arrived) / elapsed
        self._num_arrived, self._since = num_arrived, now
        # An observation of several seconds weighs as much as so many of one.
        kept = (1 - LEVEL_WEIGHT) ** elapsed
        before = self.level
        self.level = (1 - kept) * rate + kept * (before + self.trend * elapsed)
        kept = (1 - TREND_WEIGHT) ** elapsed
        self.trend = (1 - kept) * (self.level - before) / elapsed + kept * self.trend

    def forecast(self, ahead_s: float) -> float:
        """Requests a second after so many seconds, if it goes on as it does."""
        return max(0.0, self.level + self.trend * ahead_s)


class Predictive:
    """As many as will be needed when a worker that is started now is there.

    Rule: the need is the rate of arrivals HORIZON_S from now, as Holt's method forecasts it, over what one worker is
    measured to end in a second when it is full; never less than what holds all that is there.
    Invariant: that of `Band`; with a constant rate the forecast becomes that rate.
    Source: Holt 1957; Das et al. 2016 and Roy et al. 2011 for scaling by forecasts.
    """

    name = "predictive"

    def __init__(self, limits: ScaleLimits) -> None:
        self._band = Band(limits)
        self._arrivals = Holt()

    def decide(self, view: ScaleView) -> Target:
        self._arrivals.observe(view.num_arrived, view.now)
        rate = self._arrivals.forecast(HORIZON_S)
        need = view.seats_needed
        if view.requests_per_s:
            need = max(need, rate / view.requests_per_s)
        why = f"{rate:.2f} requests/s in {HORIZON_S:g} s, a worker ends {view.requests_per_s:.2f}"
        return self._band.settle(view, need, why)


SCALES: Final[Mapping[str, Callable[[ScaleLimits], ScalePolicy]]] = {
    policy.name: policy for policy in (Fixed, Queue, Slo, Predictive)
}


@dataclass(frozen=True, slots=True)
class Loss:
    """What goes with a worker: sequences that must end or move first, blocks that nobody else has."""

    worker: str
    num_held: int
    num_only_blocks: int


def order_by_loss(losses: Iterable[Loss]) -> list[str]:
    """The workers, the one whose loss costs least first: fewest sequences, then fewest blocks of its own."""
    return [loss.worker for loss in sorted(losses, key=lambda loss: (loss.num_held, loss.num_only_blocks, loss.worker))]
