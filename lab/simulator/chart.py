"""A line chart as inline SVG, drawn for a page whose style says the colours of its classes."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 380
HEIGHT: Final = 230
LEFT, RIGHT, TOP, BOTTOM = 52, 34, 12, 36
# Above this ratio between the largest and the least value an axis counts in powers of ten.
LOG_RATIO: Final = 30
LOG_RATIO_OF_LOADS: Final = 4
# Styles there are for lines, by the page's classes `s0`, `s1` and so on.
NUM_STYLES: Final = 8
GAP_OF_TICKS: Final = 26  # pixels, at least
LINE_HEIGHT: Final = 12


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) in the order of x; y may be infinite or no number, which leaves the point out."""

    name: str
    style: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn."""

    title: str
    unit: str
    x_title: str
    lines: Sequence[Line]
    show: Callable[[float], str]
    bar: float | None = None  # a bound worth a dashed line
    top: float | None = None  # where the axis of y ends at least, if the values have a natural end
    is_labelled: bool = False  # lines have their names at their ends


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float  # pixels of `low`
    end: float
    is_log: bool

    def at(self, value: float) -> float:
        share = (self._scale(value) - self._scale(self.low)) / (self._scale(self.high) - self._scale(self.low))
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.is_log:
            step = _round_step((self.high - self.low) / 4)
            first = math.ceil(self.low / step - 1e-9)
            return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = (1,) if len(decades) > 5 else (1, 3)
        found = [mark * 10.0**decade for decade in decades for mark in marks]
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]

    def _scale(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.is_log else value


def draw(chart: Chart) -> str:
    """A figure with its title."""
    points = [point for line in chart.lines for point in line.points if math.isfinite(point[1])]
    title = html.escape(chart.title)
    if not points:
        return f'<figure>{_caption(title, chart.unit)}<p class="none">nothing to show</p></figure>'
    x, y = _x_axis(points), _y_axis(points, chart)
    # Beside the line it would lie on those of others.
    bar = f"objective {_tick(chart, chart.bar)}" if chart.bar and _bar(chart, y) else ""
    parts = _grid(chart, x, y, sorted({point[0] for point in points}))
    for line in chart.lines:
        parts += _line(line, chart, x, y)
    parts += _bar(chart, y)
    if chart.is_labelled:
        parts += _names(chart.lines, x, y)
    label = f'role="img" aria-label="{title} over {html.escape(chart.x_title)}"'
    caption = _caption(title, chart.unit, bar)
    return f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(parts)}</svg></figure>'


def _caption(title: str, *facts: str) -> str:
    told = "; ".join(html.escape(fact.strip()) for fact in facts if fact)
    return f"<figcaption>{title}" + (f' <span class="unit">{told}</span>' if told else "") + "</figcaption>"


def _x_axis(points: Sequence[tuple[float, float]]) -> Axis:
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    # Loads that double should not crowd at one end.
    is_log = low > 0 and high / low >= LOG_RATIO_OF_LOADS
    if low == high:
        low, high = 0.5 * low, 1.5 * high
    return Axis(low, high, LEFT + 8, WIDTH - RIGHT - 8, is_log)


def _y_axis(points: Sequence[tuple[float, float]], chart: Chart) -> Axis:
    values = [y for _, y in points]
    if chart.top is None and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        return Axis(_below(min(values)), _above(max(values)), HEIGHT - BOTTOM, TOP, is_log=True)
    high = max(*values, 0.0 if chart.top is None else chart.top)
    # The bar is worth seeing if it is not far above everything.
    if chart.bar is not None and chart.bar < 2 * high:
        high = max(high, chart.bar)
    step = _round_step(high / 4) if high else 1.0
    return Axis(0.0, step * math.ceil(high / step - 1e-9) if high else 1.0, HEIGHT - BOTTOM, TOP, is_log=False)


def _grid(chart: Chart, x: Axis, y: Axis, xs: Sequence[float]) -> list[str]:
    parts, bottom = [], HEIGHT - BOTTOM
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        told = html.escape(_tick(chart, tick))
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at + 3.5:.1f}">{told}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    last = -math.inf
    for value in xs:
        if x.at(value) - last >= GAP_OF_TICKS:
            last = x.at(value)
            parts.append(f'<text class="middle" x="{last:.1f}" y="{bottom + 15}">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{HEIGHT - 5}">{html.escape(chart.x_title)}</text>')
    return parts


def _bar(chart: Chart, y: Axis) -> list[str]:
    if chart.bar is None or not y.low <= chart.bar <= y.high:
        return []
    at = y.at(chart.bar)
    return [f'<line class="bar" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>']


def _line(line: Line, chart: Chart, x: Axis, y: Axis) -> list[str]:
    style = f"s{line.style % NUM_STYLES}"
    shown = [point for point in line.points if math.isfinite(point[1])]
    path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in shown)
    parts = [f'<polyline class="line {style}" points="{path}"/>'] if len(shown) > 1 else []
    for px, py in shown:
        told = html.escape(f"{line.name}: {chart.show(py)} {chart.unit} at {px:g}".replace("  ", " "))
        dot = f'cx="{x.at(px):.1f}" cy="{y.at(py):.1f}"'
        # What the pointer must hit is larger than what is seen.
        parts.append(
            f'<g class="point"><title>{told}</title><circle class="dot {style}" {dot} r="3.5"/>'
            f'<circle class="hit" {dot} r="11"/></g>'
        )
    return parts


def _names(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    """From the top down, each below the one before."""
    ends = [(line.name, point) for line in lines for point in line.points[-1:] if math.isfinite(point[1])]
    parts, above = [], -math.inf
    for name, (px, py) in sorted(ends, key=lambda end: -end[1][1]):
        above = max(y.at(py) + 3.5, above + LINE_HEIGHT)
        parts.append(f'<text class="name" x="{x.at(px) + 8:.1f}" y="{above:.1f}">{html.escape(name)}</text>')
    return parts


def _tick(chart: Chart, value: float) -> str:
    """A value as short as it can be."""
    if value >= 10_000:
        return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"
    # Zeros behind the point say nothing.
    return re.sub(r"\.0+(?=\D|$)|(?<=\.)(\d*?)0+(?=\D|$)", r"\1", chart.show(value))


def _round_step(value: float) -> float:
    """The least of 1, 2, 2.5, 5 and 10 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999)


def _below(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return 3 * power if value >= 3 * power else power


def _above(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(mark * power for mark in (1, 3, 10) if mark * power >= value * 0.999)
