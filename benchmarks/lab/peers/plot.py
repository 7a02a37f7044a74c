"""A line chart as an SVG file, written by hand: a plot needs no dependency."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#0a7ea4")
WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 48
LEGEND_LINE = 18

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """The inside of an SVG document, WIDTH wide."""

    body: str
    height: int


def document(charts: Sequence[Chart]) -> str:
    """Charts under each other, as one SVG document."""
    parts = []
    y = 0
    for drawn in charts:
        parts.append(f'<g transform="translate(0 {y})">{drawn.body}</g>')
        y += drawn.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Line]) -> Chart:
    """Lines by name over a logarithmic x axis of base 2; y starts at 0. Points that have no positive x are left out."""
    lines = {name: [point for point in line if point[0] > 0] for name, line in lines.items()}
    xs = sorted({x for line in lines.values() for x, _ in line})
    top = nice_top(max((y for line in lines.values() for _, y in line), default=1.0))
    low, high = (math.log2(xs[0]), math.log2(xs[-1])) if xs else (0.0, 1.0)

    def position(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [_text(WIDTH / 2, 22, title, "middle", bold=True)]
    for step in range(5):
        value = top * step / 4
        y = position(1.0, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", "end"))
    parts += [_text(position(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:g}", "middle") for x in xs]
    parts.append(_text(WIDTH / 2, HEIGHT - 10, x_label, "middle"))
    parts.append(f'<g transform="translate(14 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>')
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        y = HEIGHT + LEGEND_LINE * (number + 0.5)
        points = [position(*point) for point in sorted(line)]
        parts.append(_path(points, color))
        parts.append(f'<path d="M{LEFT} {y:.1f}h24" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(LEFT + 32, y + 4, name, "start"))
    return Chart("".join(parts), HEIGHT + LEGEND_LINE * (len(lines) + 1))


def nice_top(value: float) -> float:
    """The least of 1, 2, 4 and 8 times a power of ten that is not below a value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value * (1 - 1e-12))


def _path(points: Sequence[tuple[float, float]], color: str) -> str:
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points)
    along = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{along}" fill="none" stroke="{color}" stroke-width="2"/>{dots}'


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'
