"""Curves and bars as inline SVG, for the report: no picture files, sharp at any size, readable in the dark. Pure.

Colours are those of Okabe and Ito (2008), told apart by colour-blind eyes; they are CSS classes, so that a page may change them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 26
MAX_POINTS = 600  # drawn of a curve: more are thinned
STYLE = """
.c0{stroke:#0072B2}.c1{stroke:#D55E00}.c2{stroke:#009E73}.c3{stroke:#CC79A7}.c4{stroke:#E69F00}
.f0{fill:#0072B2}.f1{fill:#D55E00}.f2{fill:#009E73}.f3{fill:#CC79A7}.f4{fill:#E69F00}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .grid{stroke:var(--grid);stroke-width:1}svg .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
svg text{fill:var(--muted);font:11px system-ui,sans-serif}
"""
Series = Mapping[str, Sequence[float | None]]


def ticks(low: float, high: float, num: int = 4, *, whole: bool = False) -> list[float]:
    """Round numbers that cover [low, high], ascending: at least two. ``whole``: none with a fraction, as epochs are."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / num
    unit = 10.0 ** math.floor(math.log10(rough))
    enough = (unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    step = next((each for each in enough if not whole or each % 1 == 0), 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 0.001 else f"{value:.4g}"


def curves(x: Sequence[float], series: Series, *, mark: float | None = None, from_zero: bool = False) -> str:
    """Lines over one axis, each with the last value in its legend; gaps where a value is missing or not finite.

    Args:
        x: ascending.
        series: values by name, as many as x.
        mark: where a dotted line stands (the best epoch).
        from_zero: whether the vertical axis begins at 0.
    """
    points = {
        name: [(a, b) for a, b in zip(x, values, strict=True) if _is_number(b)]
        for name, values in series.items()
    }
    values = [float(b or 0.0) for each in points.values() for _, b in each]
    if not values:
        return '<p class="muted">no values</p>'
    marks = ticks(min(0.0, *values), max(values) or 1.0) if from_zero else ticks(min(values), max(values))
    low, high, first, last = marks[0], marks[-1], min(x), max(x)

    def at(a: float, b: float) -> tuple[float, float]:
        share = (a - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - (b - low) / (high - low) * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in marks:
        y = at(first, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')  # fmt: skip
    for tick in sorted({t for t in ticks(first, last, whole=True) if first <= t <= last} | {first}):
        parts.append(
            f'<text x="{at(tick, low)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>'
        )
    if mark is not None and first <= mark <= last:
        spot = at(mark, low)[0]
        parts.append(
            f'<line class="mark" x1="{spot:.1f}" x2="{spot:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    for i, (name, each) in enumerate(points.items()):
        thinned = each[:: max(1, len(each) // MAX_POINTS)] if len(each) > MAX_POINTS else each
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(a, float(b or 0.0)) for a, b in thinned))
        title = f"<title>{html.escape(name)}</title>"
        if len(thinned) == 1:
            px, py = path.split(",")
            parts.append(f'<circle class="f{i % 5}" cx="{px}" cy="{py}" r="3">{title}</circle>')
        else:
            parts.append(f'<polyline class="line c{i % 5}" points="{path}">{title}</polyline>')
    legend = {name: number(float(each[-1][1] or 0.0)) if each else "-" for name, each in points.items()}
    return "".join([*parts, "</svg>", _legend(legend)])


def stacked_bar(shares: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """One bar of several parts, and what each is.

    Args:
        shares: amounts by name, in any unit.
        labels: what the legend says beside each name.
    """
    total, parts, x = sum(shares.values()) or 1.0, [], 0.0
    for i, (name, amount) in enumerate(shares.items()):
        width = 1000 * amount / total
        parts.append(
            f'<rect class="f{i % 5}" x="{x:.2f}" y="0" width="{width:.2f}" height="28"><title>{html.escape(name)}</title></rect>'
        )
        x += width
    return f'<svg viewBox="0 0 1000 28" preserveAspectRatio="none" class="bar" role="img">{"".join(parts)}</svg>{_legend(labels)}'


def stacked_columns(x: Sequence[float], series: Series) -> str:
    """Columns of several parts over one axis: seconds of each epoch by stage."""
    sums = [sum(float(values[i] or 0.0) for values in series.values()) for i in range(len(x))]
    if not sums or max(sums) <= 0:
        return '<p class="muted">no values</p>'
    every = max(1, math.ceil(len(x) / 120))  # more columns than that would be thinner than a line
    shown = range(0, len(x), every)
    marks = ticks(0.0, max(sums))
    width, scale = (WIDTH - LEFT - RIGHT) / len(shown), (HEIGHT - TOP - BOTTOM) / marks[-1]
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in marks:
        y = HEIGHT - BOTTOM - tick * scale
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')  # fmt: skip
    for column, i in enumerate(shown):
        y = float(HEIGHT - BOTTOM)
        for part, values in enumerate(series.values()):
            height = float(values[i] or 0.0) * scale
            y -= height
            parts.append(f'<rect class="f{part % 5}" x="{LEFT + (column + 0.08) * width:.1f}" y="{y:.1f}" '
                         f'width="{0.84 * width:.2f}" height="{height:.1f}"/>')  # fmt: skip
    for column in sorted({0, len(shown) // 2, len(shown) - 1}):
        centre = LEFT + (column + 0.5) * width
        parts.append(
            f'<text x="{centre:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(x[shown[column]])}</text>'
        )
    return "".join([*parts, "</svg>", _legend(dict.fromkeys(series, ""))])


def _legend(labels: Mapping[str, str]) -> str:
    items = (
        f'<span><i class="f{i % 5}"></i>{html.escape(name)}{" <b>" + html.escape(text) + "</b>" if text else ""}</span>'
        for i, (name, text) in enumerate(labels.items())
    )
    return f'<div class="legend">{"".join(items)}</div>'


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
