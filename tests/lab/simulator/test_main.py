from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.simulator.__main__ import main, sim, size
from weft import cli

Told = Callable[[list[str]], str]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = [{"at_s": 0.2 * i, "prompt_tokens": 600, "output_tokens": 30} for i in range(50)]
    path = tmp_path / "made-up.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sentence(capsys: pytest.CaptureFixture[str]) -> Told:
    """The one line that a refused command leaves on standard error."""

    def tell(argv: list[str]) -> str:
        assert cli.run(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err.strip()

    return tell


def test_sim_prints_a_line_for_each_load_and_writes_its_files(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, figures = tmp_path / "out.html", tmp_path / "out.json"
    argv = ["--trace", trace, "--workers", "2", "--preset", "vllm", "--load", "2", "0.5", "--jobs", "1"]
    assert sim([*argv, "--html", str(page), "--json", str(figures)]) == 0
    captured = capsys.readouterr()
    assert [line.split()[:3] for line in captured.out.splitlines() if line.startswith("made-up  ")] == [
        ["made-up", "vllm", "0.5"],
        ["made-up", "vllm", "2"],
    ]
    # Progress is for terminals.
    assert captured.err == ""
    assert "made-up on 2 simulated workers" in page.read_text()
    assert len(json.loads(figures.read_text())["runs"]) == 2


def test_limit_takes_the_first_requests(trace: str, tmp_path: Path) -> None:
    figures = tmp_path / "out.json"
    assert sim(["--trace", trace, "--limit", "7", "--json", str(figures), "--jobs", "1"]) == 0
    assert json.loads(figures.read_text())["runs"][0]["summary"]["num_requests"] == 7


def test_size_says_each_step_and_the_answer(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert size(["--trace", trace, "--load", "20", "--slo", "ttft=0.5", "--slo", "tbt=0.1"]) == 0
    _, *steps, answer = capsys.readouterr().out.splitlines()
    shares = {int(step.split()[0]): float(step.split("%")[0].split()[-1]) for step in steps}
    enough = int(answer.split()[0])
    assert answer == f"{enough} workers are enough."
    assert enough > 1 and shares[enough] >= 95 > shares[enough - 1]


def test_size_says_that_no_number_is_enough(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert size(["--trace", trace, "--slo", "ttft=0.001", "--max-workers", "3"]) == 1
    told = capsys.readouterr().err
    assert told == "weft size: not even with 3 workers are 95 % of 50 requests good\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--workers", "0"], "argument --workers: '0' is no whole number of at least 1"),
        (["--load", "fast"], "'fast' is no number above 0"),
        (["--preset", "orca"], "invalid choice: 'orca'"),
        (["--policy", "route"], "--policy: 'route' is not FAMILY=NAME"),
        (["--policy", "route=best"], "no route policy 'best'; there are random"),
        (["--hardware", "b900"], "no hardware 'b900'"),
        (["--slo", "ttft=soon"], "'soon' is no number of seconds above 0"),
        (["--slo", "flex:ttft=1"], "names a class"),
        (["--roles", "cook=1"], "no role 'cook'; there are both, prefill, decode"),
        (["--roles", "prefill=x"], "'x' is no whole number"),
        (["--roles", "prefill=1"], "some workers must prefill and some must decode"),
        (["--html", "/nowhere/x.html"], "/nowhere/x.html cannot be written"),
        (["--reserve", "all"], "invalid choice: 'all'"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], told: str, trace: str, sentence: Told) -> None:
    found = sentence(["sim", "--trace", trace, *argv])
    assert found.startswith("weft sim: ") and told in found


def test_trace_is_asked_for_and_named(trace: str, sentence: Told) -> None:
    assert "required: --trace" in sentence(["sim"])
    assert sentence(["size", "--trace", "none.jsonl"]).startswith("weft size: trace none.jsonl cannot be read")
    assert "no share from 0 to 1" in sentence(["size", "--trace", trace, "--share", "95"])


def test_module_runs_the_same_commands(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "--trace", trace]) == 0
    assert main([]) == 2
    assert "sim|size" in capsys.readouterr().err
