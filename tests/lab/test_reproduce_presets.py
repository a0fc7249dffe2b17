"""lab.reproduce.presets: verdicts follow from shares, and the search finds the highest load that is borne."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab.reproduce import presets
from lab.reproduce.presets import CONVERSATION, Bracket, Sizes, beaten, bracket, narrowed, outlasted
from lab.reproduce.workload import Traces
from weft.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def traces(tmp_path: Path) -> Traces:
    """One that some bear at all loads and some do not."""
    path = tmp_path / "tiny.jsonl"
    rows = [
        {
            "timestamp": 400 * i,
            "input_length": 20_000,
            "output_length": 4 + i % 3,
            "hash_ids": [*range(40 * i, 40 * i + 40)],
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Traces(tmp_path, path)


def shares(**changes: float) -> dict[str, float]:
    return dict.fromkeys(PRESETS, 0.5) | changes


@pytest.mark.parametrize(
    ("found", "value", "verdict"),
    [
        (shares(weft=0.9, mooncake=0.6), 1.5, "beats each, mooncake by least"),
        (shares(weft=0.5), 1.0, "as good: vllm has 50.0 %"),
        (shares(weft=0.3, deepflow=0.6), 0.5, "does not beat each: deepflow has 60.0 %"),
    ],
)
def test_verdict_is_against_the_best_of_the_others(found: dict[str, float], value: float, verdict: str) -> None:
    claim = beaten(CONVERSATION, 2.0, found, "here")

    assert (claim.measured.value, claim.verdict) == (value, verdict)
    assert claim.measured.note.startswith("here: vllm 50.0 %, ")


def test_none_that_bears_any_load_is_beaten_without_bound() -> None:
    claim = outlasted(CONVERSATION, dict.fromkeys(PRESETS, 0.0) | {"weft": 0.5}, "here")

    assert claim.row()["measured"] is None
    assert claim.verdict.startswith("beats each")


def test_bracket_ends_at_the_first_load_that_is_too_much() -> None:
    assert bracket({1.0: 1.0, 2.0: 0.95, 4.0: 0.5, 8.0: 0.95}) == Bracket(2.0, 4.0)
    assert bracket({1.0: 0.1, 2.0: 0.0}) == Bracket(0.0, 1.0)
    assert bracket({1.0: 1.0, 2.0: 0.9}) == Bracket(2.0, float("inf"))


@pytest.mark.parametrize("start", [Bracket(0.0, 1.0), Bracket(1.0, 2.0), Bracket(4.0, float("inf"))])
def test_search_comes_near_to_what_is_borne(start: Bracket) -> None:
    wanted = {"low": 0.3, "middle": 1.7, "high": 19.0}
    kept = {name: most for name, most in wanted.items() if start.low <= most < start.high}

    def are_borne(tried: Sequence[tuple[str, float]]) -> list[bool]:
        return [load <= wanted[name] for name, load in tried]

    found = narrowed(dict.fromkeys(kept, start), are_borne, 12)
    assert kept
    assert all(
        found[name].low <= most < found[name].high <= presets.NEAR * found[name].low for name, most in kept.items()
    )


def test_search_ends_after_its_rounds() -> None:
    rounds: list[int] = []

    def are_borne(tried: Sequence[tuple[str, float]]) -> list[bool]:
        rounds.append(len(tried))
        return [False] * len(tried)

    assert narrowed({"a": Bracket(0.0, 8.0), "b": Bracket(1.0, 1.05)}, are_borne, 3) == {
        "a": Bracket(0.0, 1.0),
        "b": Bracket(1.0, 1.05),
    }
    assert rounds == [1, 1, 1]


def test_sweep_has_a_line_for_each_load_of_the_trace_that_is_given(traces: Traces) -> None:
    sizes = Sizes(num_requests=24, num_workers=2, num_rounds=1, num_processes=1)
    claims = presets.claims(traces, sizes)

    names = [claim.measured.name for claim in claims]
    loads = [f"{load:g}x" for load in CONVERSATION.loads]
    over = f"{presets.OURS} over the best other"
    assert names[: len(loads)] == [f"presets/tiny, {load}, goodput, {over}" for load in loads]
    assert names[len(loads)] == f"presets/tiny, load at which 90 % are good, {over}"
    assert sum("where all refuse" in name for name in names) == len(loads) - 1
    assert sum("ablation" in name for name in names) == len(presets.CHANGED)
    assert "first 24 requests" in claims[0].measured.note and " 2 a800" in claims[0].measured.note
    # What it is to tell apart is there.
    assert len({claim.measured.note.rpartition(": ")[2] for claim in claims[: len(loads)]}) > 1


def test_page_has_what_was_measured() -> None:
    rows = json.loads((ROOT / "lab/results/presets.json").read_text())["claims"]
    measured = {}
    for row in rows:
        if found := re.match(
            r"presets/(.*), ([\d.]+x), goodput(?: where all refuse)?, weft over the best", row["name"]
        ):
            values = re.findall(r"[a-z]+ ([\d.]+ %)", row["conditions"].rpartition(": ")[2])
            measured.setdefault(f"{found[1]}, {found[2]}", []).append(values)
    page = (ROOT / "lab/PRESETS.md").read_text().split("\n## Side by side\n")[1]
    written = {}
    for line in page.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in measured:
            written[name] = cells
    # As they are: all five; refusing: those of the others that do not by themselves, past the lightest load.
    others = [place for place, name in enumerate(PRESETS) if name in presets.REFUSING]
    refusing = {name: [fair[0][place] if fair else "-" for place in others] for name, (_, *fair) in measured.items()}
    assert written == {name: [*own, *refusing[name]] for name, (own, *_) in measured.items()}
