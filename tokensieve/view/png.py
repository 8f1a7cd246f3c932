"""The picture of a run: the frames behind the last stage, and the charts."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from tokensieve.view.cells import State, states
from tokensieve.view.data import ViewData
from tokensieve.view.files import atomic
from tokensieve.view.frame_charts import FrameChart, budget_chart, uniqueness_chart
from tokensieve.view.overlay import VEIL, VEIL_LEFT, fit, overlay
from tokensieve.view.quantities import (
    CHART_TITLES,
    Measure,
    claim,
    even_choice,
    facts,
    legend,
    measures,
    token_rows,
)
from tokensieve.view.regions import crop

__all__ = ["MOST_VIEWS", "write_png"]

MOST_VIEWS = 64
"""Frames that a picture shows at most; of more, an even choice."""

_WIDTH, _MARGIN, _GAP, _CAPTION, _DPI = 1600, 44, 14, 26, 100
_LARGEST, _CHART, _HEADING = 560, 216, 78
_INDENT, _ROW = 40, 52
_PAPER, _INK, _SOFT, _RULE = "#faf9f6", "#1d1f23", "#666a72", "#e2dfd8"
_FRONT, _BACK, _EVEN, _WARN = "#2f6d8c", "#cfd6da", "#a33b2a", "#8a4b08"


def _rgb(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


_LEGEND: dict[str, dict[str, Any]] = {
    "kept": {"facecolor": "#b9cfae", "edgecolor": _SOFT},
    "merged": {"facecolor": "#d98a4e", "edgecolor": "#a8541c"},
    "left": {"facecolor": _rgb(VEIL_LEFT)},
    "dropped": {"facecolor": _rgb(VEIL)},
    "absent": {"facecolor": "#b0b0b0", "edgecolor": "#787878", "hatch": "////"},
}


def write_png(data: ViewData, path: str | Path) -> None:
    """Write the picture of a run.

    Parameters
    ----------
    data : ViewData
        What to show; of several states the last one.
    path : str or Path
        The file to be; written in one step, so that it is complete or unchanged.

    Raises
    ------
    TokensieveError
        If the file cannot be written.
    """
    with warnings.catch_warnings():
        # A question may hold letters that the font lacks; boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _Sheet(data).figure
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI, facecolor=_PAPER)


class _Sheet:
    """Lays the parts out from top to bottom, in pixels."""

    def __init__(self, data: ViewData) -> None:
        self.data, self.found = data, states(data.item)
        self.chosen = even_choice(len(data.shown), MOST_VIEWS)
        self.head = self._head()
        mosaic, captions = self._mosaic()
        charts = self._charts()
        rows = -(-len(charts) // 3)
        # The last row takes only the room that its charts fill.
        spare = _CHART - max(height for _, height, _, _ in charts[3 * (rows - 1) :])
        top = _MARGIN + sum(height for _, _, _, height in self.head) + 44
        self.height = top + mosaic.shape[0] + 30 + rows * (_CHART + _HEADING) - spare + _MARGIN // 2
        self.figure = Figure(figsize=(_WIDTH / _DPI, self.height / _DPI), dpi=_DPI)
        self._write_head()
        self._legend(top - 34)
        self._paint(mosaic, captions, top)
        for number, draw in enumerate(charts):
            row, column = divmod(number, 3)
            self._place(draw, top + mosaic.shape[0] + 72 + row * (_CHART + _HEADING), column)

    def _head(self) -> list[tuple[str, float, str, int]]:
        """(text, size in points, colour, height in pixels) of every line above the frames."""
        data, state = self.data, self.found[-1]
        title, more = claim(data, self.found)
        over = " on ".join(part for part in (data.method or "Kept visual tokens", data.host) if part)
        lines = [(over, 12.0, _SOFT, 30), (title, 26.0, _INK, 52)]
        lines += [(more, 13.0, _INK, 28)] if more else []
        about = [data.label, *facts(data)]
        about += [f"shown {state.name.lower()} on"] if state.layer else []
        if len(self.chosen) < len(data.shown):
            about.append(f"{len(self.chosen)} of {len(data.shown)} {data.unit}s shown")
        lines += _wrapped("    ".join(part for part in about if part), _SOFT)
        lines += _wrapped(data.note, _WARN)
        talk = [("Question", data.question)] if data.question else []
        for name, text in [*talk, *data.answers.items()]:
            lines += _wrapped(f"{name}: {text}", _INK)
        return lines

    def _write_head(self) -> None:
        y = _MARGIN
        for text, size, colour, height in self.head:
            # Dollar signs in a question are no formula.
            self.figure.text(
                _MARGIN / _WIDTH,
                1 - y / self.height,
                text,
                size=size,
                color=colour,
                va="top",
                weight="bold" if size > 20 else "normal",
                parse_math=False,
            )
            y += height

    def _legend(self, y: float) -> None:
        entries = legend(self.found[-1:])
        self.figure.legend(
            handles=[Patch(**_LEGEND[kind], label=words) for kind, words in entries],
            loc="upper left",
            bbox_to_anchor=((_MARGIN - 6) / _WIDTH, 1 - (y - 6) / self.height),
            ncols=len(entries),
            frameon=False,
            fontsize=11,
            labelcolor=_SOFT,
            handlelength=1.2,
            handleheight=1.0,
            columnspacing=2.0,
            borderaxespad=0.0,
        )

    def _mosaic(self) -> tuple[NDArray[np.uint8], list[tuple[float, float, float, str, str]]]:
        """All views in one picture, and (left, right, bottom, name, count) of every caption."""
        data, state = self.data, self.found[-1]
        count = len(self.chosen)
        columns = next(columns for columns, most in ((1, 1), (2, 2), (3, 3), (4, 8), (6, 18), (8, 64)) if count <= most)
        room = _WIDTH - 2 * _MARGIN
        side = min(_LARGEST, (room - (columns - 1) * _GAP) // columns)
        titles = data.titles()
        canvas_rows, y = [], 0
        captions: list[tuple[float, float, float, str, str]] = []
        paper = np.array([int(_PAPER[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
        for start in range(0, count, columns):
            shots = [self._shot(view, state, side) for view in self.chosen[start : start + columns]]
            height = max(shot.shape[0] for shot in shots) + _CAPTION
            row = np.broadcast_to(paper, (height, room, 3)).copy()
            for place, (shot, view) in enumerate(zip(shots, self.chosen[start : start + columns], strict=True)):
                x, bottom = place * (side + _GAP), height - _CAPTION
                row[bottom - shot.shape[0] : bottom, x : x + shot.shape[1]] = shot
                cells = state.views[view]
                kept = f"{state.kept[view]} / {cells.patches}"
                captions.append((x, x + shot.shape[1], y + bottom, titles[view], kept))
            canvas_rows.append(row)
            y += height
        return np.concatenate(canvas_rows), captions

    def _shot(self, view: int, state: State, side: int) -> NDArray[np.uint8]:
        picture = crop(self.data.frames, self.data.shown[view])
        height, width = picture.shape[:2]
        # Portrait pictures get no wider than landscape ones get high, so that a row stays a row.
        longer = side if width >= height else round(side * min(1.0, 1.4 * width / height) * height / width)
        picture = fit(picture, longer, state.views[view].state.shape)
        return overlay(picture, state.views[view])[:, :side]

    def _paint(
        self, mosaic: NDArray[np.uint8], captions: Sequence[tuple[float, float, float, str, str]], y: float
    ) -> None:
        height, width = mosaic.shape[:2]
        axes = self.figure.add_axes(
            (_MARGIN / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height)
        )
        axes.set_axis_off()
        axes.imshow(mosaic, interpolation="none", extent=(0, width, height, 0), aspect="auto")
        narrow = captions[0][1] - captions[0][0] < 190
        for left, right, bottom, name, kept in captions:
            style: dict[str, Any] = {"va": "top", "size": 8.5 if narrow else 10, "parse_math": False}
            axes.text(left, bottom + 4, name, color=_SOFT, ha="left", **style)
            axes.text(right, bottom + 4, kept, color=_INK, ha="right", **style)

    def _charts(self) -> list[tuple[str, int, int, Callable[[Any], None]]]:
        """(heading, height, indentation for labels, drawing function) of every chart."""
        data, found = self.data, self.found
        charts: list[tuple[str, int, int, Callable[[Any], None]]] = []
        for chart in (uniqueness_chart(data), budget_chart(data, found)):
            if chart is not None:
                charts.append((chart.name, _CHART, _INDENT, partial(_draw_frames, chart)))
        for name, rows in {"tokens": token_rows(data, found), **measures(data)}.items():
            charts.append((CHART_TITLES[name], min(_CHART, len(rows) * _ROW), 0, partial(_draw_rows, rows)))
        return charts

    def _place(self, chart: tuple[str, int, int, Callable[[Any], None]], y: float, column: int) -> None:
        name, height, indent, draw = chart
        width = (_WIDTH - 2 * _MARGIN - 2 * 56) / 3
        x = _MARGIN + column * (width + 56)
        self.figure.text(x / _WIDTH, 1 - (y - 14) / self.height, name, size=12, color=_INK, weight="bold", va="bottom")
        box = ((x + indent) / _WIDTH, 1 - (y + height) / self.height)
        axes = self.figure.add_axes((*box, (width - indent) / _WIDTH, height / self.height))
        axes.set_facecolor("none")
        for side in axes.spines.values():
            side.set_visible(False)
        draw(axes)


def _wrapped(text: str, colour: str) -> list[tuple[str, float, str, int]]:
    """A text in at most two lines of the sheet."""
    pieces = textwrap.wrap(text, 165, max_lines=2, placeholder=" ...", drop_whitespace=True)
    return [(line, 11.5, colour, 27) for line in pieces]


def _draw_frames(chart: FrameChart, axes: Any) -> None:
    """One bar per frame."""
    frames = len(chart.layers[0])
    place = np.arange(frames) + 0.5
    wide = 0.8 if frames <= 128 else 1.0
    floor = 0.01 * (chart.high - chart.low)
    for number, values in enumerate(chart.layers):
        last = number == len(chart.layers) - 1
        paint: Any = _FRONT if last else _BACK
        if last and chart.colours is not None:
            paint = [_rgb(colour) for colour in chart.colours]
        heights = np.nan_to_num(np.asarray(values, float) - chart.low)
        shown = ~np.isnan(np.asarray(values, float))
        if chart.colours is not None:
            heights = np.where(shown, np.maximum(heights, floor), 0.0)
        axes.bar(place, heights, wide, bottom=chart.low, color=paint, linewidth=0)
    if chart.line is not None:
        edges = np.repeat(np.arange(frames + 1), 2)[1:-1]
        axes.plot(edges, np.repeat(chart.line, 2), color=_EVEN, linewidth=1.3, linestyle=(0, (4, 3)))
    axes.set_xlim(0, frames)
    axes.set_ylim(chart.low, chart.high)
    axes.set_yticks([value for value, _ in chart.levels], [text for _, text in chart.levels])
    axes.set_xticks([frame + 0.5 for frame, _ in chart.ticks], [text for _, text in chart.ticks])
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_SOFT)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_rows(rows: Sequence[Measure], axes: Any) -> None:
    """Horizontal bars with their values in words."""
    largest = max((max(row.after, row.before or 0.0) for row in rows if row.bar), default=0.0) or 1.0
    axes.set_xlim(0, largest)
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for number, row in enumerate(rows):
        y = number + 0.5
        axes.text(0, y, row.name, size=10, color=_SOFT, va="bottom", ha="left", parse_math=False)
        axes.text(largest, y, row.text, size=10, color=_INK, va="bottom", ha="right", parse_math=False)
        if not row.bar:
            continue
        if row.before is not None:
            axes.barh(y + 0.19, row.before, 0.22, color=_BACK, linewidth=0)
        axes.barh(y + 0.19, row.after, 0.22, color=_FRONT, linewidth=0)
