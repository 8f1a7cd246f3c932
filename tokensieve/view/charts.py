"""Charts as inline SVG: light enough to read as text, named for screen readers, coloured by the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from tokensieve.view.frame_charts import FrameChart
from tokensieve.view.quantities import Measure

__all__ = ["bar_rows", "frame_chart"]

_WIDTH, _HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 6, 12, 26


def frame_chart(chart: FrameChart, identity: str) -> Markup:
    """One bar per frame.

    Parameters
    ----------
    chart : FrameChart
        Values, scale and words.
    identity : str
        Name of the picture, unique in the page.
    """
    low, high, layers, colours = chart.low, chart.high, chart.layers, chart.colours
    frames = len(layers[0])
    span = high - low if high > low else 1.0
    step = (_WIDTH - _LEFT - _RIGHT) / frames
    gap = min(4.0, 0.22 * step) if frames <= 128 else 0.0
    floor = _HEIGHT - _BOTTOM

    def across(frame: float) -> float:
        return _LEFT + frame * step

    def down(value: float) -> float:
        return floor - (min(max(value, low), high) - low) / span * (floor - _TOP)

    body = Markup()
    for value, text in chart.levels:
        y = f"{down(value):.1f}"
        body += Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        body += Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(
            _LEFT - 6, f"{down(value) + 3.5:.1f}", text
        )
    for number, values in enumerate(layers):
        last = number == len(layers) - 1
        for frame, value in enumerate(values):
            if math.isnan(value):
                continue
            # A bar at the bottom of the scale still shows that there is a value.
            height = max(floor - down(value), 1.5 if value or colours else 0.0)
            paint = Markup(' style="fill:rgb({},{},{})"').format(*colours[frame]) if colours and last else Markup()
            body += Markup(
                '<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"{}><title>{}</title></rect>'
            ).format(
                "front" if last else "back",
                f"{across(frame) + gap / 2:.2f}",
                f"{floor - height:.2f}",
                f"{step - gap:.2f}",
                f"{height:.2f}",
                paint,
                chart.tips[frame],
            )
    if chart.line is not None:
        points = " ".join(
            f"{across(frame + side):.1f},{down(value):.1f}" for frame, value in enumerate(chart.line) for side in (0, 1)
        )
        body += Markup('<polyline class="even" points="{}"/>').format(points)
    for frame, text in chart.ticks:
        x = min(max(across(frame + 0.5), _LEFT + 8), _WIDTH - _RIGHT - 16)
        body += Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(f"{x:.1f}", floor + 17, text)
    return _frame(chart.name, chart.description, _HEIGHT, body, identity)


def bar_rows(name: str, description: str, rows: Sequence[Measure], identity: str) -> Markup:
    """Horizontal bars with their values in words; a pale bar behind shows the value without compression."""
    largest = max((max(row.after, row.before or 0.0) for row in rows if row.bar), default=0.0) or 1.0
    body, y = Markup(), 14
    for row in rows:
        body += Markup('<text class="name" x="0" y="{}">{}</text>').format(y, row.name)
        if len(row.name) + len(row.text) > 56:
            y += 16
        body += Markup('<text class="value end" x="{}" y="{}">{}</text>').format(_WIDTH, y, row.text)
        if not row.bar:
            y += 24
            continue
        if row.before is not None:
            body += Markup('<rect class="back" x="0" y="{}" width="{}" height="9" rx="1.5"/>').format(
                y + 6, f"{max(1.0, row.before / largest * _WIDTH):.2f}"
            )
        body += Markup('<rect class="front" x="0" y="{}" width="{}" height="9" rx="1.5"/>').format(
            y + 6, f"{max(1.0, row.after / largest * _WIDTH):.2f}"
        )
        y += 40
    return _frame(name, description, max(y - 16, 20), body, identity)


def _frame(name: str, description: str, height: int, body: Markup, identity: str) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{name}</title><desc id="{i}-d">{desc}</desc>{body}</svg>'
    ).format(w=_WIDTH, h=height, i=identity, name=name, desc=description, body=body)
