"""What the charts with one bar per frame show: uniqueness and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tokensieve.view.cells import State
from tokensieve.view.data import ViewData

__all__ = ["FrameChart", "budget_chart", "frame_uniqueness", "signed", "uniqueness_chart"]

_STOPS = ((122, 146, 176), (84, 152, 178), (122, 178, 140), (228, 182, 76), (226, 122, 60), (198, 54, 50))


@dataclass(frozen=True)
class FrameChart:
    """A chart with one bar per frame.

    Attributes
    ----------
    name, description
        What the chart shows, and what one sees in it.
    layers
        Values of every frame; further layers are drawn over the first. NaN leaves a gap.
    low, high
        Values at the bottom and at the top.
    levels
        (value, text) of the horizontal rules.
    ticks
        (frame, text) under the bars.
    tips
        Text of every bar.
    colours
        Colour of every bar of the last layer; None for the theme's colour.
    line
        A dashed reference value per frame.
    """

    name: str
    description: str
    layers: Sequence[Sequence[float]]
    low: float
    high: float
    levels: Sequence[tuple[float, str]]
    ticks: Sequence[tuple[int, str]]
    tips: Sequence[str]
    colours: Sequence[tuple[int, int, int]] | None = None
    line: Sequence[float] | None = None


def _ramp(share: float) -> tuple[int, int, int]:
    """Colour of a value between 0 (grey-blue) and 1 (red), readable on light and on dark ground."""
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    rest = place - low
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return red, green, blue


def frame_uniqueness(data: ViewData) -> NDArray[np.float64] | None:
    """Uniqueness of every view as the method reported it, or None.

    A method that ran on some of the frames reports those only; the others are NaN.
    """
    found = data.item.info.get("frame_uniqueness")
    if found is None:
        return None
    values = torch.as_tensor(found).detach().double().cpu().flatten().numpy()
    occupied = (data.item.per_frame() > 0).numpy()
    if values.size == 0 or not np.isfinite(values).all():
        return None
    if values.size == occupied.size:
        return values
    if values.size != occupied.sum():
        return None
    spread = np.full(occupied.size, np.nan)
    spread[occupied] = values
    return spread


def uniqueness_chart(data: ViewData) -> FrameChart | None:
    """Frame uniqueness as bar height and colour, as in the VidCom2 article; None when it was not reported."""
    values = frame_uniqueness(data)
    if values is None or values.size < 2:
        return None
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    span = high - low if high > low else 1.0
    titles, middle = data.titles(), (low + high) / 2
    most = int(np.nanargmax(values))
    return FrameChart(
        f"Uniqueness of every {data.unit}",
        f"The most unique {data.unit} is at {titles[most]} with {signed(high)}; the scale begins at the least unique "
        f"one, {signed(low)}.",
        [values.tolist()],
        low,
        low + span,
        [(value, signed(value, 2)) for value in ((low, middle, high) if high > low else (low,))],
        _ticks(data, titles),
        [f"{title}: {signed(value)}" for title, value in zip(titles, values, strict=True)],
        [_ramp(0.0 if np.isnan(value) else (value - low) / span) for value in values],
    )


def budget_chart(data: ViewData, found: Sequence[State]) -> FrameChart:
    """Tokens of every frame in front of the LLM and behind its last cut, with the even spread as a line."""
    entered, last = found[0].kept, found[-1].kept
    layers = [entered, last] if entered != last else [entered]
    patches = [view.patches for view in found[-1].views]
    share = sum(last) / max(1, sum(patches))
    line = [share * count for count in patches]
    titles = data.titles()
    high = float(max(1, *entered, *line))
    low, most = min(last), max(last)
    spread = f"between {low} and {most} tokens" if low < most else f"{low} tokens each"
    description = f"Here {spread}; the dashed line is an even spread, {sum(line) / len(line):.1f} on average."
    tips = [
        f"{title}: {now} of {count}" + (f", {first} entered" if first != now else "")
        for title, now, count, first in zip(titles, last, patches, entered, strict=True)
    ]
    if len(layers) > 1:
        description += f" Pale bars: in front of the LLM; full bars: from layer {found[-1].layer} on."
    return FrameChart(
        f"Tokens kept per {data.unit}",
        description,
        layers,
        0.0,
        1.06 * high,
        [(float(value), f"{value}") for value in _levels(high)],
        _ticks(data, titles),
        tips,
        line=line,
    )


def signed(value: float, digits: int = 3) -> str:
    """A number with a typographic minus."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _levels(high: float) -> list[int]:
    """Three to five round numbers from zero up."""
    raw = max(1.0, high / 4)
    size = 10 ** int(np.log10(raw))
    step = max(1, int(next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.99)))
    return list(range(0, int(high) + 1, step))


def _ticks(data: ViewData, titles: Sequence[str]) -> list[tuple[int, str]]:
    """At most five names at even steps: start times of a video, numbers of views otherwise."""
    count = len(titles)
    places = range(0, count, max(1, -(-count // 5)))
    if data.timestamps is None:
        return [(place, f"{place + 1}") for place in places]
    return [(place, titles[place].split("\N{EN DASH}")[0].split(",")[0]) for place in places]
