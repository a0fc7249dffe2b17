from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
from pathlib import Path

import pytest

from lab.simulator import servegen
from lab.simulator.trace import Arrival, Drawing, Trace, lru_hit_ratio, read
from weft.errors import SettingsError

MOONCAKE = '{"timestamp": %d, "input_length": %d, "output_length": 5, "hash_ids": %s}\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read(path)
    assert "\n" not in caught.value.message and str(path) in caught.value.message
    return caught.value.message


def test_arrivals_of_one_moment_are_spread_until_the_next_moment(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", "".join(MOONCAKE % (at, 600, "[0, 1]") for at in (0, 0, 2000, 2000, 9000)))
    assert [arrival.at_s for arrival in read(path).arrivals] == [0, 1, 2, 3.5, 9]
    assert [arrival.at_s for arrival in read(path, spread=False).arrivals] == [0, 0, 2, 2, 9]


def test_compressed_trace_is_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "m.jsonl", MOONCAKE % (0, 600, "[0, 1]"))
    packed = tmp_path / "m.jsonl.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert read(packed) == read(plain) == Trace("m", (Arrival(0.0, 600, 5, (0, 1)),), 512)


def test_our_own_lines_say_who_asks_and_their_block_size(tmp_path: Path) -> None:
    row = {
        "at_s": 1.5,
        "prompt_tokens": 40,
        "output_tokens": 7,
        "block_ids": [3, 4],
        "block_size": 32,
        "tenant": "acme",
        "priority": -1,
        "slo_class": "flex",
    }
    found = read(write(tmp_path / "own.jsonl", json.dumps(row)))
    assert found == Trace("own", (Arrival(1.5, 40, 7, (3, 4), "acme", -1, "flex"),), 32)


def test_azures_times_begin_at_zero(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,3,0"
    )
    found = read(write(tmp_path / "a.csv", text))
    assert found.arrivals == (Arrival(0.0, 374, 44), Arrival(4.0, 3, 1))
    assert found.duration_s == 4.0 and found.rate_rps == 0.5


def test_lengths_alone_get_arrivals_at_the_rate(tmp_path: Path) -> None:
    lines = "".join(f"{100 + i},{i}\n" for i in range(2000))
    path = write(tmp_path / "v.csv", f"num_prefill_tokens,num_decode_tokens\n{lines}")
    found = read(path, drawn=Drawing(rate_per_s=50, num_requests=1500, seed=3))
    assert [arrival.num_prompt_tokens for arrival in found.arrivals] == [100 + i for i in range(1500)]
    # Of 1500 gaps the mean is within 10 % of its own with a chance of 99.99 %.
    assert found.rate_rps == pytest.approx(50, rel=0.1)
    assert found == read(path, drawn=Drawing(50, 1500, 3)) != read(path, drawn=Drawing(50, 1500, 4))


def test_faster_trace_keeps_its_order_and_takes_less_time() -> None:
    trace = Trace("t", tuple(Arrival(float(i), 1 + i, 1) for i in range(5)), 16)
    assert [arrival.at_s for arrival in trace.faster(2).arrivals] == [0, 0.5, 1, 1.5, 2]
    assert trace.first(2).arrivals == trace.arrivals[:2]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not a request: Expecting"),
        ('{"timestamp": 1}', "line 2 is not a request: it has no 'input_length'"),
        ("[]", "line 2 is not a request"),
        (MOONCAKE % (-1, 600, "[0, 1]"), "line 2 is not a request: its time is -0.001"),
        (MOONCAKE % (1, 0, "[]"), "line 2 is not a request: it needs a prompt"),
        (MOONCAKE % (1, 600, "[0, -1]"), "block ids are whole numbers"),
        (MOONCAKE % (1, 600, "[0, 1, 2]"), "it has more blocks of 512 tokens than its prompt"),
        ('{"at_s": 1, "prompt_tokens": 9, "output_tokens": 1, "block_size": 64}', "a trace has one block_size"),
    ],
)
def test_bad_line_is_named(line: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(write(tmp_path / "bad.jsonl", MOONCAKE % (0, 600, "[0, 1]") + line))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,1\n", "line 2 is not a request"),
        ("num_prefill_tokens,num_decode_tokens\n5,4\n5,x\n", "line 3 is not a request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a,b\n", "is neither JSON lines, nor"),
        ("\n", "is empty"),
    ],
)
def test_bad_table_is_named(text: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(write(tmp_path / "bad.csv", text))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.jsonl")
    assert "cannot be read" in refusal(write(tmp_path / "torn.jsonl.xz", "{}"))
    assert "cannot be read" in refusal(write(tmp_path / "torn.tar.xz", "{}"))


# ---- one cache over a trace ----


def chain(*prompts: tuple[int, tuple[int, ...]]) -> Trace:
    return Trace("t", tuple(Arrival(float(i), tokens, 1, ids) for i, (tokens, ids) in enumerate(prompts)), 512)


def test_hits_are_leading_blocks_and_at_most_the_prompt() -> None:
    # Of the second prompt all 600 tokens, though its blocks have 1024; of the third nothing, as its first is new.
    trace = chain((600, (0, 1)), (600, (0, 1)), (1024, (7, 1)))
    assert lru_hit_ratio(trace, None) == 600 / 2224


def test_least_recently_used_block_goes_first() -> None:
    trace = chain((1024, (0, 1)), (512, (0,)), (512, (2,)), (512, (0,)), (1024, (0, 1)))
    # Two blocks fit: 2 takes the place of 1, since 0 was used after it.
    assert lru_hit_ratio(trace, 1024) == (512 + 512 + 512) / 3584
    assert lru_hit_ratio(trace, 1535) == lru_hit_ratio(trace, 1024)
    assert lru_hit_ratio(trace, 511) == 0


# ---- ServeGen's clients ----


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:xz") as packed:
        for name, text in files.items():
            member = tarfile.TarInfo(f"m-small/{name}")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text.encode()))
    return path


def windows(*rates: float, family: str = "Gamma", shape: float = 0.5) -> str:
    return "".join(f"{600 * i},{rate},2.0,{family},{shape},0.1\n" for i, rate in enumerate(rates))


LENGTHS = json.dumps(
    {
        "0": {"input_tokens": "{}", "output_tokens": "{}"},
        "600": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{3: 1.0}"},
        "1200": {"input_tokens": "{30: 1.0}", "output_tokens": "{4: 1.0}"},
    }
)


def test_clients_come_at_their_rates_and_with_their_lengths(tmp_path: Path) -> None:
    files = {
        "chunk-0-trace.csv": windows(1, 3, 0, 1),
        "chunk-0-dataset.json": LENGTHS,
        "chunk-1-trace.csv": windows(5, 5, 5, 5),
    }
    path = archive(tmp_path / "s.tar.xz", files)
    found = read(path, drawn=Drawing(rate_per_s=2, num_requests=3600))
    early = [arrival for arrival in found.arrivals if arrival.at_s < 600]
    late = [arrival for arrival in found.arrivals if 600 <= arrival.at_s < 1200]
    assert {arrival.tenant for arrival in found.arrivals} == {"client-0"}
    assert not [arrival for arrival in found.arrivals if 1200 <= arrival.at_s < 1800]
    # Gaps of shape 0.5: the counts' deviation is 2^.5 of their root, so 20 % is four of them.
    assert len(late) / len(early) == pytest.approx(3, rel=0.2)
    assert {(a.num_prompt_tokens, a.num_output_tokens) for a in late} == {(10, 3), (20, 3)}
    assert found == read(path, drawn=Drawing(2, 3600)) != read(path, drawn=Drawing(2, 3600, seed=1))


@pytest.mark.parametrize("family", ["Gamma", "Weibull"])
def test_gaps_have_the_mean_of_the_rate(family: str, tmp_path: Path) -> None:
    path = archive(
        tmp_path / "s.tar.xz",
        {"chunk-0-trace.csv": windows(*[10] * 5, family=family, shape=0.7), "chunk-0-dataset.json": LENGTHS},
    )
    found = servegen.draw(servegen.read(path), 8.0, 16_000, random.Random(0))
    # 2,000 s of 8 a second, and no more than were asked for.
    assert 0.95 * 16_000 < len(found) <= 16_000 and found == sorted(found)
    assert found[-1].at_s == pytest.approx(2000, rel=0.05)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"chunk-0-trace.csv": "0,1,1,Pareto,1,1\n", "chunk-0-dataset.json": LENGTHS}, "line 1 is not a window"),
        ({"chunk-0-trace.csv": windows(1) * 2, "chunk-0-dataset.json": LENGTHS}, "line 2 is not a window"),
        ({"chunk-0-trace.csv": windows(1), "chunk-0-dataset.json": "[]"}, "chunk-0-dataset.json has no lengths"),
        ({"chunk-0-trace.csv": windows(1)}, "has no clients"),
    ],
)
def test_bad_archive_is_named(files: dict[str, str], told: str, tmp_path: Path) -> None:
    assert told in refusal(archive(tmp_path / "s.tar.xz", files))
