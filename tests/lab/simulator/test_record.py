from __future__ import annotations

import math

import pytest

from lab.simulator.record import Record, Slo, mean, quantile, summarize


def ended(number: int = 0, *, ttft: float = 0.5, gap: float = 0.05, seconds: float = 2.0, cached: int = 0) -> Record:
    return Record(
        f"r{number}",
        arrived_at=float(number),
        num_prompt_tokens=100,
        num_output_tokens=21,
        num_cached_tokens=cached,
        first_token_at=number + ttft,
        ended_at=number + seconds,
        gaps=[(gap, 20)],
    )


def refused(number: int, prefilled_s: float = 0.0) -> Record:
    return Record(f"r{number}", float(number), 100, 20, refused_at=number + 1.0, prefilled_s=prefilled_s)


def test_quantile_is_the_least_value_that_the_share_does_not_pass() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert [quantile(values, share) for share in (0, 0.25, 0.5, 0.51, 0.99, 1)] == [1, 1, 2, 3, 4, 4]
    assert math.isnan(quantile([], 0.5)) and math.isnan(mean([]))


def test_worst_gap_is_the_mean_of_the_longest_tenth() -> None:
    record = ended()
    record.gaps = [(0.1, 17), (1.0, 1), (0.5, 2)]
    assert record.worst_gap_s() == pytest.approx((1.0 + 0.5) / 2)
    assert record.mean_gap_s() == pytest.approx((1.7 + 1.0 + 1.0) / 20)
    # Of a few gaps it is the longest one.
    record.gaps = [(0.1, 3), (0.4, 1)]
    assert record.worst_gap_s() == 0.4


@pytest.mark.parametrize(
    ("slo", "is_good"),
    [(Slo(), True), (Slo(0.5, 0.05), True), (Slo(0.4, 0.05), False), (Slo(0.5, 0.04), False)],
)
def test_good_request_keeps_both_objectives(slo: Slo, is_good: bool) -> None:
    assert slo.holds(ended()) == is_good


def test_request_that_did_not_end_is_not_good() -> None:
    assert not Slo().holds(refused(0))


def test_summary_counts_what_ended_and_what_was_refused() -> None:
    records = [ended(0, ttft=0.5), ended(1, ttft=1.5, cached=50), refused(2, 0.25), refused(3)]
    found = summarize(records, Slo(ttft_s=1.0), busy_s=3.0, num_workers=2)
    assert (found.num_requests, found.num_ended, found.num_refused, found.num_good) == (4, 2, 2, 1)
    assert found.share_good == 0.25 and found.hit_ratio == 50 / 200
    assert found.ttft_mean_s == 1.0 and found.ttft_p99_s == 1.5
    assert found.wasted_prefill_s == 0.25
    # From the first arrival to the last end.
    assert found.duration_s == 3.0 and found.utilization == 0.5


def test_goodput_is_over_the_time_in_which_requests_came() -> None:
    last = ended(3, ttft=1.5)
    taken, given_up = (summarize([ended(), ended(1), end], Slo(ttft_s=1.0), 0.0, 2) for end in (last, refused(3)))
    # To take the last one, though it is late, costs nothing and gains nothing.
    assert taken.duration_s == 5.0 and given_up.duration_s == 3.0
    assert taken.goodput_rps == given_up.goodput_rps == pytest.approx(2 / 3)
    assert taken.cost_worker_s == given_up.cost_worker_s == 3000


def test_goodput_of_requests_of_one_moment_is_over_the_run() -> None:
    assert summarize([ended(0, seconds=4.0)], Slo(), 0.0, 1).goodput_rps == 0.25


def test_nothing_good_costs_more_than_any_number() -> None:
    assert summarize([refused(0)], Slo(), 0.0, 1).cost_worker_s == math.inf
    assert math.isnan(summarize([], Slo(), 0.0, 1).share_good)
