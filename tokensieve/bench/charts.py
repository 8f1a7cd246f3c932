"""Charts of a benchmark as inline SVG, coloured by the page's theme, with the exact numbers as tooltips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from tokensieve.bench.results import Results, Row

__all__ = ["curves", "front", "percent"]

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 150, 14, 40
_LABEL_STEP = 13.0


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f} %"


def curves(results: Results) -> Markup | None:
    """Accuracy over retention, one line per method; None with fewer than two retentions."""
    lines: dict[str, list[Row]] = {}
    for row in results.rows[1:]:
        if row.retention is not None:
            lines.setdefault(row.method, []).append(row)
    shares = sorted({row.retention for rows in lines.values() for row in rows if row.retention is not None})
    if len(shares) < 2:
        return None
    # From many tokens to few, so that the lines part towards their names.
    across = _scale(math.log(shares[-1]), math.log(shares[0]), _LEFT, _WIDTH - _RIGHT)
    down, body = _accuracy_axis(results)
    for share in shares:
        body += Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            _at(across(math.log(share))), _HEIGHT - _BOTTOM + 18, f"{share:g}"
        )
    body += _axis_title("share of visual tokens asked for")
    body += _reference(results, down)
    labels: list[tuple[float, str, str]] = []
    # Controls are drawn last, so that they stay visible.
    for method, rows in sorted(lines.items(), key=lambda line: line[1][0].control):
        ordered = sorted(rows, key=lambda row: -(row.retention or 0.0))
        points = [(across(math.log(row.retention or 1.0)), down(row.accuracy.value)) for row in ordered]
        tip = "; ".join(f"{row.retention:g}: {percent(row.accuracy.value)}" for row in ordered)
        marks = Markup("").join(Markup('<circle cx="{}" cy="{}" r="3"/>').format(_at(x), _at(y)) for x, y in points)
        kind = "control" if ordered[0].control else "method"
        body += Markup('<g class="line {}"><title>{}</title><polyline points="{}"/>{}</g>').format(
            kind, f"{method} \N{EN DASH} {tip}", " ".join(f"{_at(x)},{_at(y)}" for x, y in points), marks
        )
        labels.append((points[-1][1], method, kind))
    body += _end_labels(labels)
    return _frame("Accuracy over retention", "One line per method, dashed for controls.", body, "curves")


def front(results: Results) -> Markup:
    """Accuracy against LLM time, with the Pareto front."""
    times = [row.milliseconds["llm"] for row in results.rows]
    low, high = math.log(max(min(times), 1e-3)), math.log(max(max(times), 2e-3))
    edge = max(0.05 * (high - low), 0.05)
    across = _scale(low - edge, high + edge, _LEFT, _WIDTH - _RIGHT)
    down, body = _accuracy_axis(results)
    for value in _decades(math.exp(low - edge), math.exp(high + edge)):
        body += Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            _at(across(math.log(value))), _HEIGHT - _BOTTOM + 18, f"{value:g}"
        )
    body += _axis_title("milliseconds per question: compressor and LLM prefill")
    best = sorted((row for row in results.rows if row.on_front), key=lambda row: row.milliseconds["llm"])
    corners: list[str] = []
    for row in best:
        x, y = across(math.log(row.milliseconds["llm"])), down(row.accuracy.value)
        if corners:
            corners.append(f"{_at(x)},{corners[-1].split(',')[1]}")
        corners.append(f"{_at(x)},{_at(y)}")
    body += Markup('<polyline class="frontier" points="{}"/>').format(" ".join(corners))
    labels: list[tuple[float, float, str]] = []
    for row in results.rows:
        x, y = across(math.log(max(row.milliseconds["llm"], 1e-3))), down(row.accuracy.value)
        kind = "best" if row.on_front else ("control" if row.control else "method")
        tip = f"{row.setting} \N{EN DASH} {percent(row.accuracy.value)}, {row.milliseconds['llm']:.3g} ms"
        body += Markup('<g class="dot {}"><title>{}</title><circle cx="{}" cy="{}" r="4"/></g>').format(
            kind, tip, _at(x), _at(y)
        )
        if row.on_front:
            labels.append((x, y, row.setting))
    for x, y, text in _apart(labels):
        body += Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_at(x + 7), _at(y + 4), text)
    return _frame(
        "Accuracy against LLM time",
        "The line is the Pareto front: nothing is more accurate in less time.",
        body,
        "front",
    )


def _accuracy_axis(results: Results) -> tuple[Callable[[float], float], Markup]:
    """Vertical scale over the accuracies found, and its rules."""
    values = [row.accuracy.value for row in results.rows]
    low = max(0.0, math.floor(10 * min(values) - 0.5) / 10)
    high = min(1.0, math.ceil(10 * max(values) + 0.2) / 10)
    down = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    body = Markup()
    for step in range(round(10 * low), round(10 * high) + 1):
        y = _at(down(step / 10))
        body += Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        body += Markup('<text class="tick end" x="{}" y="{}">{} %</text>').format(
            _LEFT - 6, _at(down(step / 10) + 4), 10 * step
        )
    return down, body


def _reference(results: Results, down: Callable[[float], float]) -> Markup:
    """The full model as a line with its interval as a band."""
    found = results.full.accuracy
    top, bottom = down(min(1.0, found.high)), down(found.low)
    top, bottom = max(top, _TOP), min(bottom, _HEIGHT - _BOTTOM)
    body = Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
        _LEFT, _at(top), _WIDTH - _LEFT - _RIGHT, _at(max(bottom - top, 0))
    )
    y = _at(down(found.value))
    body += Markup(
        '<line class="full" x1="{}" x2="{}" y1="{}" y2="{}"><title>full model \N{EN DASH} {}</title></line>'
    ).format(_LEFT, _WIDTH - _RIGHT, y, y, percent(found.value))
    return body + Markup('<text class="tick" x="{}" y="{}">full model</text>').format(_LEFT + 6, _at(top - 4))


def _end_labels(labels: Sequence[tuple[float, str, str]]) -> Markup:
    """Names at the ends of the lines, moved apart; as many as fit."""
    room = int((_HEIGHT - _TOP - _BOTTOM) / _LABEL_STEP)
    ranked = sorted(labels, key=lambda label: (label[2] != "control", label[0]))[:room]
    placed = _apart([(_WIDTH - _RIGHT, y, f"{kind}|{name}") for y, name, kind in ranked])
    body = Markup()
    for x, y, text in placed:
        kind, _, name = text.partition("|")
        short = name if len(name) <= 22 else f"{name[:21]}\N{HORIZONTAL ELLIPSIS}"
        body += Markup('<text class="tick {}" x="{}" y="{}">{}</text>').format(kind, _at(x + 8), _at(y + 4), short)
    return body


def _apart(labels: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Labels from top to bottom, none nearer to the one above than a line of text, all inside the chart."""
    ordered = sorted(labels, key=lambda label: label[1])
    heights: list[float] = []
    for _, y, _ in ordered:
        heights.append(max(y, heights[-1] + _LABEL_STEP) if heights else y)
    limit = float(_HEIGHT - _BOTTOM)
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], limit)
        limit = heights[place] - _LABEL_STEP
    return [(x, height, text) for (x, _, text), height in zip(ordered, heights, strict=True)]


def _decades(low: float, high: float) -> list[float]:
    """Round numbers 1, 2, 5 times powers of ten between two numbers; every other rank is left out where many fit."""
    found = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in (1, 2, 5)
    ]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) <= 10 else [value for value in inside if math.log10(value) % 1 < 0.1]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0

    def place(value: float) -> float:
        return start + (value - low) / span * (end - start)

    return place


def _at(value: float) -> str:
    return f"{value:.1f}"


def _axis_title(text: str) -> Markup:
    return Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
        (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, text
    )


def _frame(name: str, description: str, body: Markup, identity: str) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{name}</title><desc id="{i}-d">{desc}</desc>{body}</svg>'
    ).format(w=_WIDTH, h=_HEIGHT, i=identity, name=name, desc=description, body=body)
