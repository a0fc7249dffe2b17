"""What became of each request of a run, and the figures that are made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One request."""

    request_id: str
    arrived_at: float
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: str = ""
    slo_class: str = ""
    num_cached_tokens: int = 0  # at its first admission to a worker
    num_fetched_tokens: int = 0  # that came from other workers' memory, whenever it was admitted
    prefilled_s: float = 0.0  # seconds of work on its prompt
    first_token_at: float | None = None
    ended_at: float | None = None
    refused_at: float | None = None
    last_token_at: float = 0.0
    gaps: list[tuple[float, int]] = field(default_factory=list)  # (seconds between tokens, how often)
    workers: list[str] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return math.inf if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def e2e_s(self) -> float:
        return math.inf if self.ended_at is None else self.ended_at - self.arrived_at

    def mean_gap_s(self) -> float:
        count = sum(count for _, count in self.gaps)
        return sum(gap * count for gap, count in self.gaps) / count if count else 0.0

    def worst_gap_s(self, share: float = 0.1) -> float:
        """Mean of the longest gaps, which is what Mooncake (FAST '25) calls a request's TBT."""
        wanted = max(1.0, share * sum(count for _, count in self.gaps))
        left, total = wanted, 0.0
        for gap, count in sorted(self.gaps, reverse=True):
            taken = min(left, count)
            total += gap * taken
            left -= taken
            if left <= 0:
                break
        return total / wanted if self.gaps else 0.0


@dataclass(frozen=True, slots=True)
class Slo:
    """What makes a request a good one."""

    ttft_s: float = math.inf
    tbt_s: float = math.inf

    def holds(self, record: Record) -> bool:
        return record.ended_at is not None and record.ttft_s <= self.ttft_s and record.worst_gap_s() <= self.tbt_s


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in figures; seconds and shares."""

    num_requests: int
    num_ended: int
    num_refused: int
    num_good: int
    share_good: float  # of all requests
    goodput_rps: float  # in the time in which requests came, which is the same whatever is refused
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tbt_p50_s: float
    tbt_p90_s: float
    tbt_p99_s: float
    e2e_mean_s: float
    e2e_p99_s: float
    hit_ratio: float  # prompt tokens that were cached
    wasted_prefill_s: float  # work on prompts of requests that were refused after it
    utilization: float
    tokens_per_s: float
    duration_s: float
    cost_worker_s: float  # for 1,000 good requests at this goodput, busy or not


def summarize(records: Sequence[Record], slo: Slo, busy_s: float, num_workers: int) -> Summary:
    """`busy_s`: seconds in which workers computed, all together."""
    ended = [record for record in records if record.ended_at is not None]
    refused = [record for record in records if record.refused_at is not None]
    began = min((record.arrived_at for record in records), default=0.0)
    last = max((record.ended_at for record in ended if record.ended_at is not None), default=began)
    duration = max(last - began, 1e-9)
    # A run that refuses the last ones ends sooner, and is no better for it.
    came_s = max((record.arrived_at for record in records), default=began) - began or duration
    good = sum(slo.holds(record) for record in ended)
    ttfts = sorted(record.ttft_s for record in ended)
    tbts = sorted(record.worst_gap_s() for record in ended)
    e2es = sorted(record.e2e_s for record in ended)
    prompts = sum(record.num_prompt_tokens for record in ended)
    return Summary(
        num_requests=len(records),
        num_ended=len(ended),
        num_refused=len(refused),
        num_good=good,
        share_good=good / len(records) if records else math.nan,
        goodput_rps=good / came_s,
        ttft_mean_s=mean(ttfts),
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p90_s=quantile(ttfts, 0.9),
        ttft_p99_s=quantile(ttfts, 0.99),
        tbt_p50_s=quantile(tbts, 0.5),
        tbt_p90_s=quantile(tbts, 0.9),
        tbt_p99_s=quantile(tbts, 0.99),
        e2e_mean_s=mean(e2es),
        e2e_p99_s=quantile(e2es, 0.99),
        hit_ratio=sum(record.num_cached_tokens for record in ended) / prompts if prompts else 0.0,
        wasted_prefill_s=sum(record.prefilled_s for record in refused),
        utilization=busy_s / (duration * num_workers) if num_workers else 0.0,
        tokens_per_s=sum(record.num_output_tokens for record in ended) / duration,
        duration_s=duration,
        cost_worker_s=1000 * came_s * num_workers / good if good else math.inf,
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, the least one that `share` of them do not pass."""
    return values[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))] if values else math.nan
