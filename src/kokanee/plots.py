"""Figures over rounds -> a plot as inline SVG: stacked bars, lines, dots, and a legend that tells the last values.

A series' `kind` is a class, to which the page's style gives a colour. One unit of x is one round; a step within a
round lies between the end of the round before and its own.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 38.0, 6.0, 8.0, 22.0
BAR = 0.6
MOST_LABELS = 12
Drawn = Literal["bars", "line", "curve", "dots"]


@dataclass(frozen=True)
class Series:
    """Points (x, y) in the order of x. Bars of several series are stacked; a curve is a line without dots.

    The last value of a quiet series is not told: it is one of many at the same x.
    """

    name: str
    kind: str
    drawn: Drawn
    points: Sequence[tuple[float, float]]
    quiet: bool = False


@dataclass(frozen=True)
class Axes:
    """Where values lie in the picture. ticks: round numbers that enclose all y; x: from round 0 to the last."""

    ticks: Sequence[float]
    rounds: int
    margin: float

    def x(self, value: float) -> float:
        share = (value + self.margin) / (self.rounds + 2 * self.margin)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def plot(
    title: str, unit: str, series: Sequence[Series], rounds: int, decimals: int = 1, from_zero: bool = False
) -> str:
    """A figure of all series that have points; nothing where none has. With bars, or `from_zero`, y begins at 0."""
    known = [one for one in series if one.points]
    if not known:
        return ""
    bars = [one for one in known if one.drawn == "bars"]
    others = [one for one in known if one.drawn != "bars"]
    heights = [top for *_, top in stacked(bars)] + [y for one in others for _, y in one.points]
    lowest = min(0.0, *heights) if bars or from_zero else min(heights)
    axes = Axes(ticks(lowest, max(heights), 10.0**-decimals), rounds, 0.5 if bars else 0.15)
    drawn = "".join([frame(axes), columns(axes, bars, decimals), *(traced(axes, one, decimals) for one in others)])
    last = [shown(one.points[-1][1], decimals) for one in known]
    told = "; ".join([title, *(f"{one.name} {value}" for one, value in zip(known, last, strict=True) if not one.quiet)])
    legend = "".join(
        f'<span><i class="{one.drawn} {one.kind}"></i>{html.escape(one.name)}'
        + ("" if one.drawn == "curve" or one.quiet else f" <strong>{value}</strong>")
        + "</span>"
        for one, value in zip(known, last, strict=True)
    )
    return (
        f'<figure class="plot"><figcaption>{html.escape(title)} <small>{html.escape(unit)}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{html.escape(told)}">{drawn}</svg>'
        f'<p class="legend">{legend}</p></figure>'
    )


def shown(value: float, decimals: int) -> str:
    """A number with so many decimals; what rounds to nothing has no sign."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """Three to six round numbers in even steps of `smallest` or more, the first not above `low`, the last not below
    `high`."""
    span = max(high - low or abs(high) / 10 or 1.0, 4 * smallest)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 2) + 1)]


def frame(axes: Axes) -> str:
    """Lines across at round numbers of y, and the numbers of the rounds below."""
    parts = []
    for value in axes.ticks:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="left" x="{LEFT - 5:g}" y="{y + 4:.1f}">{value:g}</text>')
    for number in range(0, axes.rounds + 1, math.ceil((axes.rounds + 1) / MOST_LABELS)):
        parts.append(f'<text x="{axes.x(number):.1f}" y="{HEIGHT - 6:g}">{number}</text>')
    return "".join(parts)


def stacked(bars: Sequence[Series]) -> list[tuple[Series, float, float, float]]:
    """(series, x, bottom, top) of every bar, each upon those of the series before it."""
    reached: dict[float, float] = defaultdict(float)
    found = []
    for one in bars:
        for x, height in one.points:
            found.append((one, x, reached[x], reached[x] + height))
            reached[x] += height
    return found


def columns(axes: Axes, bars: Sequence[Series], decimals: int) -> str:
    width = axes.x(BAR) - axes.x(0)
    return "".join(
        f'<rect class="{one.kind}" x="{axes.x(x - BAR / 2):.1f}" y="{axes.y(top):.1f}" width="{width:.1f}" '
        f'height="{axes.y(bottom) - axes.y(top):.1f}">{hint(one, x, top - bottom, decimals)}</rect>'
        for one, x, bottom, top in stacked(bars)
    )


def traced(axes: Axes, one: Series, decimals: int) -> str:
    """A line and its dots, dots alone, or a curve, which begins anew in every round."""
    spots = [(axes.x(x), axes.y(y)) for x, y in one.points]
    lines: dict[int, list[str]] = defaultdict(list)
    for (x, _), (right, down) in zip(one.points, spots, strict=True):
        lines[math.ceil(x - 1e-9) if one.drawn == "curve" else 0].append(f"{right:.1f},{down:.1f}")
    drawn = [f'<polyline class="{one.drawn} {one.kind}" points="{" ".join(line)}"/>' for line in lines.values()]
    dots = [
        f'<circle class="{one.kind}" cx="{right:.1f}" cy="{down:.1f}" r="3.2">{hint(one, x, y, decimals)}</circle>'
        for (x, y), (right, down) in zip(one.points, spots, strict=True)
    ]
    return "".join(drawn * (one.drawn != "dots") + dots * (one.drawn != "curve"))


def hint(one: Series, x: float, y: float, decimals: int) -> str:
    """What is told where the mouse rests."""
    return f"<title>Round {x:g}: {html.escape(one.name)} {shown(y, decimals)}</title>"
