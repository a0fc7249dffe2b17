"""A sweep as one page of HTML that needs nothing else: charts over the load, and the table. Light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Final

from lab.simulator.chart import NUM_STYLES, Chart, Line, draw
from lab.simulator.report import LEGEND, MEASURES, Heading, cells
from lab.simulator.sweep import Row

# Charts: what they are called, and the figures of MEASURES that they share where there is only one series.
PANELS: Final = (
    ("Good requests", ("goodput",)),
    ("Share of good requests", ("good",)),
    ("Time to first token", ("ttft_p50", "ttft_p90", "ttft_p99")),
    ("Time between tokens", ("tbt_p50", "tbt_p99")),
    ("Prompt tokens that were cached", ("hits",)),
    ("Requests refused", ("refused",)),
    ("Prefill wasted on refused requests", ("wasted",)),
    ("Time in which workers computed", ("busy",)),
    ("Worker time for 1,000 good requests", ("cost",)),
)
# What is compared by its differences, not its ratios, and so begins at zero.
_TOPS: Final = {"goodput": 0.0}
Key = tuple[str, str]  # trace and preset: what makes a series


def page(heading: Heading, rows: Sequence[Row]) -> str:
    """The whole page."""
    series = list(dict.fromkeys((row.trace, row.preset) for row in rows))
    charts = [chart for title, names in PANELS for chart in _charts(title, names, heading, rows, series)]
    empty = [chart.title for chart in charts if _is_nothing(chart)]
    return _PAGE.format(
        style=_STYLE,
        title=html.escape(heading.title),
        hardware=html.escape(heading.hardware),
        promise=html.escape(heading.promise),
        legend=_legend(series),
        charts="\n".join(draw(chart) for chart in charts if not _is_nothing(chart)),
        empty=f"<p>In every run zero: {html.escape('; '.join(empty).lower())}.</p>" if empty else "",
        table=_table(rows),
        meaning=html.escape(" ".join(LEGEND)),
        command=html.escape(heading.command),
    )


def _charts(
    title: str, names: Sequence[str], heading: Heading, rows: Sequence[Row], series: Sequence[Key]
) -> list[Chart]:
    """Of a single series one chart with all figures, else a chart of all series for each figure."""
    if len(series) == 1:
        lines = [_line(name, _quantile(name), i, rows, series[0]) for i, name in enumerate(names)]
        return [_chart(title, names[0], heading, lines, is_labelled=len(names) > 1)]
    charts = []
    for name in names:
        lines = [_line(name, _series_name(key, series), i, rows, key) for i, key in enumerate(series)]
        full = f"{title}, {_quantile(name)}" if len(names) > 1 else title
        charts.append(_chart(full, name, heading, lines, is_labelled=False))
    return charts


def _chart(title: str, name: str, heading: Heading, lines: Sequence[Line], *, is_labelled: bool) -> Chart:
    measure = MEASURES[name]
    bar = {"ttft": heading.slo.ttft_s, "tbt": heading.slo.tbt_s}.get(name.partition("_")[0], math.inf)
    return Chart(
        title=title,
        unit=measure.unit,
        x_title="load, as a multiple of the trace's own rate",
        lines=lines,
        show=measure.show,
        bar=bar if math.isfinite(bar) else None,
        top=_TOPS.get(name) if measure.unit else 1.0,
        is_labelled=is_labelled,
    )


def _is_nothing(chart: Chart) -> bool:
    """Whether it has nothing but zeros."""
    values = [value for line in chart.lines for _, value in line.points if not math.isnan(value)]
    return bool(values) and not any(values)


def _line(name: str, told: str, style: int, rows: Sequence[Row], key: Key) -> Line:
    points = sorted((row.load, MEASURES[name].of(row)) for row in rows if (row.trace, row.preset) == key)
    return Line(told, style, tuple(points))


def _quantile(name: str) -> str:
    return name.rpartition("_")[2]


def _series_name(key: Key, series: Sequence[Key]) -> str:
    """Without what all have in common."""
    return ", ".join(part for i, part in enumerate(key) if len({other[i] for other in series}) > 1)


def _legend(series: Sequence[Key]) -> str:
    if len(series) == 1:
        return ""
    entries = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><line class="line s{i % NUM_STYLES}" x1="1" x2="21" y1="4" '
        f'y2="4"/></svg>{html.escape(_series_name(key, series))}</li>'
        for i, key in enumerate(series)
    )
    return f'<ul class="legend">{entries}</ul>'


def _table(rows: Sequence[Row]) -> str:
    lines, num_names = cells(rows), 2
    if len({row.trace for row in rows}) == 1:
        # It is in the title.
        lines, num_names = [line[1:] for line in lines], 1
    head, *body = lines
    heads = _cells('th scope="col"', head, num_names)
    inside = "\n".join(f"<tr>{_cells('td', line, num_names)}</tr>" for line in body)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{inside}\n</tbody></table>"


def _cells(tag: str, texts: Sequence[str], num_names: int) -> str:
    """The first ones are names, the others figures."""
    kinds = [' class="name"'] * num_names + [""] * (len(texts) - num_names)
    return "".join(
        f"<{tag}{kind}>{html.escape(text)}</{tag.split()[0]}>" for kind, text in zip(kinds, texts, strict=True)
    )


_STYLE: Final = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1c1b19; --quiet: #63615c;
  --grid: #e5e4df; --axis: #b5b3ac;
  --c0: #2a6fd0; --c1: #c2521b; --c2: #14885e; --c3: #a0308f; --c4: #8a6a00; --c5: #5543b8;
  --c6: #a61f3c; --c7: #4a4a48 }
@media (prefers-color-scheme: dark) { :root { --page: #161614; --card: #20201d; --ink: #f0efeb; --quiet: #a8a69f;
  --grid: #33332f; --axis: #6a6963;
  --c0: #6ea8ff; --c1: #ff9057; --c2: #45c996; --c3: #e886d8; --c4: #dcb743; --c5: #a99bff;
  --c6: #ff8095; --c7: #c4c3bd } }
* { box-sizing: border-box }
body { margin: 0; padding: 32px 24px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1240px; margin: 0 auto }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 4px }
p { margin: 0; color: var(--quiet) }
.promise::first-letter { text-transform: uppercase }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 20px 0 0; padding: 0; list-style: none }
.legend svg { width: 22px; height: 8px; margin-right: 8px; vertical-align: middle }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px; margin: 20px 0 }
figure { margin: 0; padding: 14px 12px 8px; background: var(--card); border: 1px solid var(--grid); border-radius: 8px }
figcaption { font-weight: 600; padding: 0 4px 6px }
.unit { color: var(--quiet); font-weight: 400 }
figure svg { display: block; width: 100%; height: auto }
.none { padding: 24px 4px }
text { font-size: 11px; fill: var(--quiet); font-variant-numeric: tabular-nums }
text.name { fill: var(--ink) }
.middle { text-anchor: middle } .end { text-anchor: end }
.grid { stroke: var(--grid) } .axis { stroke: var(--axis) } .bar { stroke: var(--ink); stroke-dasharray: 4 3 }
text.name { paint-order: stroke; stroke: var(--card); stroke-width: 3px }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.dot { stroke: var(--card); stroke-width: 1.5 } .hit { fill: transparent } .point:hover .dot { stroke: var(--ink) }
STYLES
.scroll { margin-top: 16px; overflow-x: auto; background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid) }
tr:last-child td { border-bottom: 0 }
th { color: var(--quiet); font-weight: 600 }
.name { text-align: left }
.meaning { margin-top: 10px; font-size: 13px }
code { font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere }
""".replace(
    "STYLES",
    "\n".join(f".line.s{i} {{ stroke: var(--c{i}) }} .dot.s{i} {{ fill: var(--c{i}) }}" for i in range(NUM_STYLES)),
)
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>Each worker: {hardware}.</p>
<p class="promise">{promise}.</p>
{legend}
<div class="charts">
{charts}
</div>
{empty}
<div class="scroll">{table}</div>
<p class="meaning">{meaning}.</p>
<p class="meaning"><code>{command}</code></p>
</main>
</body>
</html>
"""
