"""lab.reproduce: every part runs on a tiny trace, and verdicts follow from the figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lab.report import Figure
from lab.reproduce import cache_aware, chunked, completion, fairness, heatmap, rejection, reserve, routing
from lab.reproduce.__main__ import FAMILIES, main
from lab.reproduce.chunked import Gaps, p99_gap_s
from lab.reproduce.claim import Claim, at_least, ratio, shown
from lab.reproduce.rejection import Overload
from lab.reproduce.reserve import Occupancy
from lab.reproduce.routing import ordered_claims
from lab.simulator.record import Record, Slo, summarize


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.jsonl"
    rows = [
        {"timestamp": 100 * i, "input_length": 1000, "output_length": 4 + i % 3, "hash_ids": [0, 1 + i % 5]}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for which a part takes a moment."""
    monkeypatch.setattr(reserve, "NUM_REQUESTS", 20)
    monkeypatch.setattr(chunked, "RATES_RPS", (0.5, 1.0))
    monkeypatch.setattr(fairness, "DURATION_S", 10.0)
    monkeypatch.setattr(completion, "NUM_REQUESTS", 40)
    monkeypatch.setattr(cache_aware, "NUM_GROUPS", 4)
    monkeypatch.setattr(routing, "LOADS", (1.0,))
    monkeypatch.setattr(rejection, "LOADS", (2.0,))
    monkeypatch.setattr(heatmap, "NUM_OF_CELL", 4)
    monkeypatch.setattr(heatmap, "PROMPTS", (256, 1024))


@pytest.mark.parametrize("name", FAMILIES)
def test_part_runs_on_a_tiny_trace(name: str, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", name, "--trace", str(trace)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith(f"{name}/") and len(line.split(" | ")) == 5 for line in lines)


def test_lru_of_a_trace_is_counted_by_hand(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--only", "lru", "--trace", str(trace)])

    # 5 of 24 prompts miss their second block, and the first one its first as well.
    expected = round((4 * 512 + 19 * 1000) / 24_000, 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines][-1] == "lru/unbounded"
    assert f"measured {expected} of prompt tokens" in lines[-1]
    assert lines[-1].endswith("no claim")


def test_json_has_what_is_printed_and_the_conditions(trace: Path, tmp_path: Path) -> None:
    main(["--only", "lru", "--trace", str(trace), "--json", str(tmp_path / "out.json")])

    written = json.loads((tmp_path / "out.json").read_text())
    assert {"machine", "commit", "python"} <= set(written["conditions"])
    assert [claim["verdict"] for claim in written["claims"]] == ["no claim"] * 6


def test_missing_trace_ends_with_status_2_and_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "lru", "--traces", str(tmp_path)]) == 2

    errors = capsys.readouterr().err.splitlines()
    assert "mooncake_conversation_trace" in errors[-1]
    assert len(errors) == 2


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(2.0, "reproduces"), (1.9, "reproduces"), (1.5, "same sign, smaller: small"), (0.9, "does not reproduce: small")],
)
def test_verdict_of_a_factor_follows_from_the_figure(value: float, verdict: str) -> None:
    assert at_least("x/y", value, 2.0, "paper", "here", "small").verdict == verdict


def test_no_gain_reproduces_no_claim_however_small() -> None:
    assert at_least("x/y", 1.0, 1.05, "paper", "here").verdict == "does not reproduce"


def test_exact_claim_reproduces_only_itself() -> None:
    verdicts = [
        Claim("trace", "0.042", Figure("lru/100k", value, ""), least=0.042, most=0.042).verdict
        for value in (0.041, 0.042, 0.043)
    ]

    assert verdicts == ["does not reproduce", "reproduces", "does not reproduce"]


def test_figure_without_a_claim_has_no_verdict() -> None:
    assert shown("x/y", 3.0, "s", "here").line() == "x/y | - | measured 3 s | here | no claim"


def test_ratio_to_nothing_is_without_bound() -> None:
    assert (ratio(2, 1), ratio(1, 0), ratio(0, 0)) == (2, float("inf"), 1)


def test_what_has_no_bound_is_left_out_of_the_json() -> None:
    assert shown("x/y", ratio(1, 0), "x", "here").row()["measured"] is None


def test_order_of_routes_is_read_off_their_first_tokens() -> None:
    good = {"min_ttft": 1.0, "prefix_aware": 1.2, "least_loaded": 2.0, "random": 8.0}
    bad = good | {"prefix_aware": 3.0}

    assert ordered_claims(good, "", "1x")[0].is_reproduced
    assert all(claim.is_reproduced for claim in ordered_claims(good, "", "1x"))
    assert ordered_claims(bad, "", "1x")[0].measured.value == 2
    assert not ordered_claims(bad, "", "1x")[0].is_reproduced


def test_paged_memory_wastes_least_and_runs_most_at_once() -> None:
    lengths = [(100, 300)] * 40

    paged, whole = reserve.occupancy(lengths, "paged"), reserve.occupancy(lengths, "reserve_max")

    assert paged.num_running > whole.num_running
    assert paged.requests_per_s > whole.requests_per_s
    assert paged.wasted < whole.wasted


def test_memory_that_gains_nothing_reproduces_nothing() -> None:
    same = Occupancy(num_running=5.0, requests_per_s=1.0, wasted=0.2)
    claims = reserve.compared("conv", dict.fromkeys(("paged", *reserve.CLAIMED), same), "here")

    assert not any(claim.is_reproduced for claim in claims if claim.claimed)


def test_p99_gap_counts_each_gap_as_often_as_it_was() -> None:
    record = Record("r", 0.0, 1, 200)
    record.gaps = [(0.1, 98), (1.0, 1), (5.0, 1)]

    assert p99_gap_s([record]) == 5.0
    record.gaps = [(0.1, 198), (1.0, 1), (5.0, 1)]
    assert p99_gap_s([record]) == 1.0


def test_chunks_reproduce_when_they_bear_a_higher_rate() -> None:
    gaps = dict.fromkeys(chunked.BATCHES, Gaps(p99_s=0.1, ttft_p50_s=0.5))
    claims = chunked.compared("code", gaps, {"chunked": 3.0, "prefill_first": 1.0, "continuous": 2.0}, "here", 1.0)

    verdicts = [claim.verdict.partition(":")[0] for claim in claims if claim.claimed]
    assert verdicts == ["reproduces", "same sign, smaller"]


def test_difference_beyond_the_bound_is_not_fair() -> None:
    steady = [fairness.service_bound() * 2] * 20
    growing = [float(i) for i in range(20)]

    assert [claim.is_reproduced for claim in fairness.compared({"fcfs": growing, "fair": steady})[:2]] == [False, True]


def test_service_grows_evenly_from_the_first_token_to_the_last() -> None:
    record = Record("r", 0.0, 100, 50, first_token_at=1.0, ended_at=3.0)

    assert [fairness.service(record, now) for now in (0.5, 1.0, 2.0, 9.0)] == [0, 100, 150, 200]


def test_rejection_that_changes_nothing_reproduces_nothing() -> None:
    same = Overload(num_refused=0, num_failed=10, wasted_s=5.0, goodput_rps=1.0)
    claims = rejection.compared(dict.fromkeys(rejection.ADMITS, same), "here", "2x")

    assert not any(claim.is_reproduced for claim in claims if claim.claimed)


def test_adversarial_mix_turns_half_way() -> None:
    usual, turned = completion.learnable(), completion.turned()
    half = len(usual) // 2

    assert usual[:half] == turned[:half]
    assert [answer for _, answer in usual] == [answer for _, answer in turned]
    assert all(one[0] != other[0] for one, other in zip(usual[half:], turned[half:], strict=True))


def test_adversarial_mixes_have_all_requests_and_one_has_a_tenant_that_lies() -> None:
    mixes = completion.adversarial(4.0)

    assert {len(trace.arrivals) for trace in mixes.values()} == {completion.NUM_REQUESTS}
    tenants = [{arrival.tenant for arrival in trace.arrivals} for trace in mixes.values()]
    assert tenants == [{""}, {""}, {""}, {"", completion.LIAR}]


def test_graceful_means_little_worse_in_the_mean_and_the_tail() -> None:
    record = Record("r", 0.0, 100, 50, first_token_at=1.0, ended_at=10.0)
    fcfs = summarize([record], Slo(), 1.0, 1)
    worse = replace(fcfs, e2e_mean_s=11.5, e2e_p99_s=19.0)
    found = {"fcfs": fcfs, "srpt, bucket": worse, "srpt, mean": fcfs, "srpt, oracle": fcfs}

    claims = completion.graceful(found, "srpt/mix", "here")

    assert [claim.is_reproduced for claim in claims if claim.claimed] == [False, True, True, True]
