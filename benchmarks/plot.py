"""A bar for each ratio on a logarithmic axis, as SVG by hand: no library, readable in a diff.

Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LEFT, WIDTH, RIGHT, STEP, TOP = 380, 480, 90, 24, 56


@dataclass(frozen=True)
class Bar:
    """``values`` of all pairs; the bar ends at their median."""

    title: str
    values: Sequence[float]
    target: float | None


def plot(title: str, bars: Sequence[Bar]) -> str:
    """An SVG image; bars that reach their target are green, the others orange, without one grey."""
    finite = [v for bar in bars for v in (*bar.values, bar.target or 1) if 0 < v < math.inf]
    low = math.floor(math.log10(min([*finite, 0.5])))
    high = max(low + 1, math.ceil(math.log10(max(finite))))

    def x(value: float) -> float:
        place = math.log10(min(max(value, 10.0**low), 10.0**high))
        return LEFT + WIDTH * (place - low) / (high - low)

    height = TOP + STEP * len(bars) + 16
    width = LEFT + WIDTH + RIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-size="15">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        colour = "#555" if power == 0 else "#ddd"
        out += [
            f'<line x1="{at:.0f}" y1="{TOP - 8}" x2="{at:.0f}" y2="{height - 12}" '
            f'stroke="{colour}"/>',
            f'<text x="{at:.0f}" y="{TOP - 14}" text-anchor="middle" fill="#555">'
            f"{10.0**power:g}×</text>",
        ]
    for number, bar in enumerate(bars):
        out += _bar(bar, TOP + STEP * number, x)
    return "\n".join([*out, "</svg>", ""])


def _bar(bar: Bar, y: int, x: Callable[[float], float]) -> list[str]:
    middle = statistics.median(bar.values)
    reached = bar.target is None or middle >= bar.target
    colour = "#b8b8b8" if bar.target is None else "#3a9a5b" if reached else "#e08a2c"
    start, end = sorted((x(1.0), x(middle)))
    shown = "∞" if math.isinf(middle) else f"{middle:.3g}×"
    line = y + 9
    out = [
        f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(bar.title)}</text>',
        f'<rect x="{start:.1f}" y="{y + 2}" width="{end - start + 0.5:.1f}" height="14" '
        f'fill="{colour}"/>',
        f'<line x1="{x(min(bar.values)):.1f}" x2="{x(max(bar.values)):.1f}" y1="{line}" '
        f'y2="{line}" stroke="#222" stroke-width="1.5"/>',
        f'<text x="{LEFT + WIDTH + 10}" y="{y + 13}">{shown}</text>',
    ]
    if bar.target is not None:
        at = x(bar.target)
        out.append(f'<path d="M{at:.1f} {y + 14} l-5 6 h10 z" fill="#222"/>')
    return out
