"""The self-contained page: everything embedded, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from tokensieve.view.cells import CellState, State, states
from tokensieve.view.charts import bar_rows, frame_chart
from tokensieve.view.data import ViewData
from tokensieve.view.files import atomic
from tokensieve.view.frame_charts import budget_chart, frame_uniqueness, signed, uniqueness_chart
from tokensieve.view.overlay import fit, overlay
from tokensieve.view.quantities import (
    CHART_TITLES,
    claim,
    even_choice,
    facts,
    legend,
    measures,
    requests,
    token_rows,
)
from tokensieve.view.regions import crop

__all__ = ["MOST_VIEWS", "render_html", "write_html"]

MOST_VIEWS = 256
"""Frames that a page shows at most; of more, an even choice."""

_BUDGET = 5_500_000
_SIZES = ((512, 84), (448, 82), (384, 80), (320, 78), (256, 74), (192, 70), (128, 60))

_CHART_NOTES = {
    "time": "Seconds per stage of this run.",
    "work": "Floating-point operations without and with compression, counted from the shapes.",
    "memory": "Bytes in decimal units.",
}


@dataclass(frozen=True)
class _Card:
    """One view on the page: a picture per state."""

    title: str
    detail: str
    patches: int
    counts: list[int]
    pictures: list[str]
    alternatives: list[str]
    shape: tuple[int, int]


def write_html(data: ViewData, path: str | Path) -> None:
    """Write the page of a run.

    Parameters
    ----------
    data : ViewData
        What to show.
    path : str or Path
        The file to be; written in one step, so that it is complete or unchanged.

    Raises
    ------
    TokensieveError
        If the file cannot be written.
    """
    page = render_html(data)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_html(data: ViewData) -> str:
    """The page as text; at most about 6 MB up to a few hundred frames."""
    found = states(data.item)
    title, more = claim(data, found)
    chosen = even_choice(len(data.shown), MOST_VIEWS)
    script = _template_text("report.js")
    template = _environment().get_template("report.html")
    return template.render(
        data=data,
        claim=title,
        more=more,
        facts=facts(data),
        states=[("Original", 0), *((state.name, sum(state.kept)) for state in found)],
        first=len(found),
        cards=_cards(data, found, chosen),
        hidden=len(data.shown) - len(chosen),
        legend=legend(found),
        requests=requests(data, found),
        charts=_charts(data, found),
        table=_table(data, found),
        style=Markup(_template_text("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tokensieve.view"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template_text(name: str) -> str:
    return (resources.files("tokensieve.view") / "templates" / name).read_text(encoding="utf-8")


def _cards(data: ViewData, found: Sequence[State], chosen: Sequence[int]) -> list[_Card]:
    """The pictures, at the largest size at which the page stays small."""
    pictures = _fitting(data, found, chosen)
    titles = data.titles()
    cards = []
    for view, (encoded, shape) in zip(chosen, pictures, strict=True):
        patches = found[0].views[view].patches
        counts = [state.kept[view] for state in found]
        merged = [state.views[view].count(CellState.MERGED) for state in found]
        described = [f"{titles[view]}, the original picture"] + [
            f"{titles[view]}, {state.name}: {count} of {patches} patches kept"
            + (f", {folded} merged into others" if folded else "")
            for state, count, folded in zip(found, counts, merged, strict=True)
        ]
        region = data.shown[view]
        numbers = (
            f"{region.first + 1}" if region.first == region.last else f"{region.first + 1}\N{EN DASH}{region.last + 1}"
        )
        cards.append(
            _Card(
                titles[view],
                numbers if data.timestamps is not None else "",
                patches,
                [patches, *counts],
                encoded,
                described,
                shape,
            )
        )
    return cards


_Pictures = list[tuple[list[str], tuple[int, int]]]


def _fitting(data: ViewData, found: Sequence[State], chosen: Sequence[int]) -> _Pictures:
    """Encoded pictures (original and states) of every view, with width and height, within the page's budget."""
    sample = [chosen[number] for number in even_choice(len(chosen), 4)]
    for side, quality in _SIZES[:-1]:
        share = len(chosen) / len(sample)
        if _size(_encode(data, found, sample, side, quality)) * share > _BUDGET:
            continue
        pictures = _encode(data, found, chosen, side, quality)
        if _size(pictures) <= _BUDGET:
            return pictures
    return _encode(data, found, chosen, *_SIZES[-1])


def _encode(data: ViewData, found: Sequence[State], chosen: Sequence[int], side: int, quality: int) -> _Pictures:
    result = []
    for view in chosen:
        picture = crop(data.frames, data.shown[view])
        # Enlarging a small picture more than twice adds bytes and nothing to see.
        side_here = min(side, 2 * max(picture.shape[:2]))
        picture = fit(picture, side_here, found[0].views[view].state.shape)
        shots = [picture, *(overlay(picture, state.views[view]) for state in found)]
        result.append(([_jpeg(shot, quality) for shot in shots], (picture.shape[1], picture.shape[0])))
    return result


def _size(pictures: _Pictures) -> int:
    return sum(len(text) for encoded, _ in pictures for text in encoded)


def _jpeg(picture: NDArray[np.uint8], quality: int) -> str:
    """A data URI; colours are not subsampled, so that the edges of patches stay sharp."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _charts(data: ViewData, found: Sequence[State]) -> list[dict[str, Any]]:
    """Title, picture and caption of every chart there is something for."""
    charts = []
    uniqueness = uniqueness_chart(data)
    for number, chart in enumerate(one for one in (uniqueness, budget_chart(data, found)) if one is not None):
        charts.append({"title": chart.name, "svg": frame_chart(chart, f"frames{number}"), "note": chart.description})
    rows = token_rows(data, found)
    charts.append(
        {
            "title": "Tokens",
            "svg": bar_rows("Tokens", "Tokens without and with compression.", rows, "tokens"),
            "note": "Pale: without compression. Full: with it.",
        }
    )
    for name, listed in measures(data).items():
        charts.append(
            {
                "title": CHART_TITLES[name],
                "svg": bar_rows(CHART_TITLES[name], _CHART_NOTES[name], listed, name),
                "note": _CHART_NOTES[name],
            }
        )
    return charts


def _table(data: ViewData, found: Sequence[State]) -> dict[str, Any]:
    """Counts of every view in numbers."""
    uniqueness = frame_uniqueness(data)
    merged = any(state.count(CellState.MERGED) for state in found)
    head = [data.unit, "patches", *(state.name.lower() for state in found)]
    head += ["merged"] if merged else []
    head += ["uniqueness"] if uniqueness is not None else []
    rows = []
    for view, title in enumerate(data.titles()):
        row = [title, str(found[0].views[view].patches), *(str(state.kept[view]) for state in found)]
        row += [str(found[0].views[view].count(CellState.MERGED))] if merged else []
        if uniqueness is not None:
            row.append("" if np.isnan(uniqueness[view]) else signed(uniqueness[view]))
        rows.append(row)
    return {"head": head, "rows": rows}
