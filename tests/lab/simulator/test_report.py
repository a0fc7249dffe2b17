from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lab.simulator.chart import Chart, Line, draw
from lab.simulator.page import page
from lab.simulator.record import Record, Slo, summarize
from lab.simulator.report import MEASURES, Heading, number, table, to_json
from lab.simulator.sweep import Row

HEADING = Heading("day <1> on 2 simulated workers", "a <card>", Slo(1.0, 0.1), "weft sim --trace 'a&b'")


def row(load: float, preset: str = "weft", trace: str = "day") -> Row:
    record = Record("r", 0.0, 10, 5, first_token_at=load, ended_at=load + 1, gaps=[(0.05 * load, 4)])
    return Row(trace, preset, load, 2, 3.0 * load, summarize([record], HEADING.slo, 1.0, 2))


def charts(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg viewBox=\"0 0 380.*?</svg>", text, re.DOTALL)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (0.5, "0.500"), (1.234, "1.23"), (56.78, "56.8"), (1776.2, "1,776"), (4e-4, "0")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_table_has_a_line_for_each_run_and_says_what_good_means() -> None:
    lines = table(HEADING, [row(0.5), row(2.0)]).splitlines()
    assert "first token comes within 1 s and" in lines[1] and "at most 0.1 s" in lines[1]
    head, half, double = lines[3:6]
    assert head.split()[:4] == ["trace", "preset", "load", "req/s"]
    assert half.split()[:6] == ["day", "weft", "0.5", "1.50", "0.500", "0.500"]
    assert "100.0 %" in half and " 0.0 %" in double
    assert double.split()[-1] == "-"  # what no request was good for has no cost
    assert len({line.rindex(text) + len(text) for line, text in ((head, "req/s"), (half, "1.50"))}) == 1


def test_promise_names_only_what_was_asked() -> None:
    assert replace(HEADING, slo=Slo()).promise == "a request is good if it ends"
    assert "gaps" not in replace(HEADING, slo=Slo(ttft_s=2)).promise


def test_json_has_every_figure_and_null_for_none() -> None:
    found = json.loads(to_json(HEADING, [row(2.0)]))
    assert found["asked"]["slo"] == {"ttft_s": 1.0, "tbt_s": 0.1}
    assert found["runs"][0]["summary"]["ttft_p50_s"] == 2.0
    assert found["runs"][0]["summary"]["cost_worker_s"] is None


class Tags(HTMLParser):
    """Says whether tags close in order, and keeps what they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else() -> None:
    text, tags = page(HEADING, [row(0.5), row(2.0)]), Tags()
    tags.feed(text)
    assert tags.open == [] and tags.links == []
    assert "day &lt;1&gt;" in text and "a&amp;b" in text and "<card>" not in text
    assert not re.search(r"url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text


def test_page_of_one_series_has_quantiles_in_one_chart() -> None:
    text = page(HEADING, [row(0.5), row(1.0), row(2.0)])
    ttft = charts(text)[2]
    assert len(ttft.findall("polyline")) == 3
    assert [text.text for text in ttft.findall("text[@class='name']")] == ["p50", "p90", "p99"]
    assert len(ttft.findall("line[@class='bar']")) == 1
    assert 'Time to first token <span class="unit">s; objective 1</span>' in text


def test_trace_is_in_the_table_where_there_are_several() -> None:
    one, two = (page(HEADING, [row(1.0), row(1.0, trace=trace)]) for trace in ("day", "night"))
    assert '<th scope="col" class="name">trace</th>' in two and ">trace</th>" not in one
    assert '<td class="name">night</td><td class="name">weft</td><td>1</td>' in two
    assert '<tr><td class="name">weft</td><td>1</td>' in one


def test_page_of_several_series_has_a_chart_for_each_figure_and_a_legend() -> None:
    text = page(HEADING, [row(load, preset) for preset in ("weft", "vllm") for load in (1.0, 2.0)])
    assert re.findall(r"<figcaption>([^<]*)", text)[2:5] == [
        f"Time to first token, {share}" + " " for share in ("p50", "p90", "p99")
    ]
    assert all(len(chart.findall("polyline")) == 2 for chart in charts(text)[:1])
    assert re.findall(r"</svg>(\w+)</li>", text) == ["weft", "vllm"]


def test_what_is_zero_in_every_run_is_said_instead_of_drawn() -> None:
    text = page(HEADING, [row(1.0), row(2.0)])
    assert "In every run zero: prompt tokens that were cached; requests refused; prefill wasted" in text
    assert len(charts(text)) == 6


def draw_values(*values: float, **facts: object) -> ElementTree.Element | None:
    line = Line("a", 0, tuple((float(i), value) for i, value in enumerate(values, 1)))
    chart = replace(Chart("title", "s", "load", [line], number), **facts)  # type: ignore[arg-type]  # its own fields
    found = re.search("<svg.*</svg>", draw(chart))
    return ElementTree.fromstring(found[0]) if found else None


def heights(svg: ElementTree.Element) -> list[float]:
    return [float(dot.get("cy", "")) for dot in svg.iter("circle") if "dot" in dot.get("class", "")]


def test_points_lie_by_their_values() -> None:
    svg = draw_values(0.0, 5.0, 10.0)
    assert svg is not None
    low, middle, high = heights(svg)
    assert low > middle > high and middle == pytest.approx((low + high) / 2)


def test_values_far_apart_get_a_logarithmic_axis() -> None:
    svg = draw_values(0.01, 0.1, 1.0)
    assert svg is not None
    low, middle, high = heights(svg)
    assert middle == pytest.approx((low + high) / 2)


def test_ticks_are_short() -> None:
    svg = draw_values(0.0, 4e6, bar=2.5e6)
    assert svg is not None
    assert [text.text for text in svg.findall("text[@class='end']")] == ["0", "1M", "2M", "3M", "4M"]


def test_objective_is_told_only_where_it_is_drawn() -> None:
    for bar, is_drawn in ((3.0, True), (100.0, False), (None, False)):
        drawn = draw(Chart("title", "s", "load", [Line("a", 0, ((1.0, 1.0), (2.0, 4.0)))], number, bar=bar))
        assert ("objective 3" in drawn) == ('class="bar"' in drawn) == is_drawn


def test_what_has_no_value_is_left_out() -> None:
    svg = draw_values(1.0, math.inf, 3.0)
    assert svg is not None and len(heights(svg)) == 2
    assert draw_values(math.inf, math.nan) is None


def test_one_point_and_only_zeros_can_be_drawn() -> None:
    for values in ((0.0,), (5.0,), (0.0, 0.0)):
        svg = draw_values(*values)
        assert svg is not None and all(0 < height < 230 for height in heights(svg))


def test_every_measure_shows_what_is_not_there_as_a_dash() -> None:
    assert {measure.show(math.nan) for measure in MEASURES.values()} == {"-"}
