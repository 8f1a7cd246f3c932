"""The numbers behind the charts and tables, from a `ViewData`; what is unknown is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.measure.text import in_bytes, in_flops, in_percent, in_seconds
from tokensieve.view.cells import CellState, State
from tokensieve.view.data import ViewData

__all__ = [
    "CHART_TITLES",
    "Measure",
    "claim",
    "even_choice",
    "facts",
    "legend",
    "measures",
    "requests",
    "token_rows",
]

CHART_TITLES = {"tokens": "Tokens", "time": "Time", "work": "Arithmetic", "memory": "Memory"}
"""Headings of the charts with horizontal bars."""


@dataclass(frozen=True)
class Measure:
    """One row of a bar chart.

    Attributes
    ----------
    name
        What was measured.
    after, before
        With compression, and without (None when only one value exists).
    text
        The values in words.
    bar
        Whether a bar is drawn; values on another scale than their neighbours are only written.
    """

    name: str
    after: float
    before: float | None
    text: str
    bar: bool = True


def even_choice(views: int, most: int) -> list[int]:
    """All views, or an even choice of ``most`` of them that begins with the first and ends with the last."""
    if views <= most:
        return list(range(views))
    return [number * (views - 1) // (most - 1) for number in range(most)]


def claim(data: ViewData, found: Sequence[State]) -> tuple[str, str]:
    """The page's headline, ``6272 -> 1553 visual tokens (24.8 %)``, and what it leaves open."""
    total, entered = data.item.layout.patches, sum(found[0].kept)
    arrow = "\N{RIGHTWARDS ARROW}"
    last = sum(found[-1].kept)
    if len(found) == 1 or entered == last:
        return f"{total} {arrow} {entered} visual tokens ({in_percent(entered / total)})", ""
    behind = f"from layer {found[-1].layer} on"
    if entered == total:
        return (
            f"{total} {arrow} {last} visual tokens {behind} ({in_percent(last / total)})",
            "All of them enter the LLM.",
        )
    return (
        f"{total} {arrow} {entered} visual tokens ({in_percent(entered / total)})",
        f"{last} of them ({in_percent(last / total)}) go on {behind}.",
    )


def facts(data: ViewData) -> list[str]:
    """Short statements under the headline."""
    total = len(data.frames)
    words = "frame" if data.timestamps is not None or data.item.layout.kind == "video" else "picture"
    height, width = data.frames[0].shape[:2]
    found = [
        f"{total} {words}{'s' if total != 1 else ''}",
        f"{width} \N{MULTIPLICATION SIGN} {height} pixels",
    ]
    grids = sorted(set(data.item.layout.views), reverse=True)
    listed = " and ".join(f"{rows} \N{MULTIPLICATION SIGN} {columns}" for rows, columns in grids)
    found.append(f"{listed} patches a {data.unit}")
    return found


def requests(data: ViewData, found: Sequence[State]) -> list[dict[str, str]]:
    """Rows of requested against achieved retention, one per method."""
    asked = data.report.get("requested") or []
    rows = []
    for one in asked:
        achieved = _achieved(one, data, found)
        rows.append(
            {
                "method": str(one["method"]),
                "counted": str(one.get("counted", "patches that enter the LLM")),
                "requested": in_percent(float(one["retention"])),
                "achieved": in_percent(achieved),
            }
        )
    if not rows and "retention" in data.settings:
        share = sum(found[0].kept) / data.item.layout.patches
        rows.append(
            {
                "method": data.method,
                "counted": "patches that enter the LLM",
                "requested": in_percent(float(data.settings["retention"])),
                "achieved": in_percent(share),
            }
        )
    return rows


def _achieved(one: Mapping[str, Any], data: ViewData, found: Sequence[State]) -> float:
    """Share that a method reached where its retention counts."""
    counted = str(one.get("counted", ""))
    total = data.item.layout.patches
    if "averaged" in counted:
        return float(data.report.get("patches", {}).get("average_share", sum(found[-1].kept) / total))
    if one.get("dropped") is not None and len(found) > 1:
        # The cut ranks what arrives at it, so its share is one of those.
        return sum(found[-1].kept) / max(1, sum(found[-2].kept))
    return sum(found[0].kept) / total


def token_rows(data: ViewData, found: Sequence[State]) -> list[Measure]:
    """Tokens without and with compression."""
    total = data.item.layout.patches
    rows = []
    for state in found:
        count = sum(state.kept)
        name = "patches that enter the LLM" if state.layer == 0 else f"patches from layer {state.layer} on"
        rows.append(Measure(name, count, total, _counts(total, count)))
    separators = data.item.layout.tokens - total
    if separators:
        kept = data.item.separators
        rows.append(Measure("newline tokens", kept, separators, _counts(separators, kept), kept != separators))
    sequence = data.report.get("sequence")
    if sequence:
        before, after = int(sequence["uncompressed"]), int(sequence["entered"])
        rows.append(Measure("whole prompt, text included", after, before, _counts(before, after)))
    return rows


def _counts(before: int, after: int) -> str:
    if before == after:
        return f"{before}"
    return f"{before} \N{RIGHTWARDS ARROW} {after} ({in_percent(after / max(1, before))})"


def measures(data: ViewData) -> dict[str, list[Measure]]:
    """Charts of the report: ``"time"``, ``"work"`` and ``"memory"``, each only where there are values."""
    report = data.report
    calls = report.get("calls") or {}
    found: dict[str, list[Measure]] = {"time": [], "work": [], "memory": []}
    for stage, seconds in (report.get("seconds") or {}).items():
        if calls.get(stage, 1 if seconds else 0):
            steps = f" in {calls[stage]} steps" if stage == "decode" and calls.get(stage, 0) > 1 else ""
            found["time"].append(Measure(stage, seconds, None, in_seconds(seconds) + steps))
    for stage, name in (("encoder", "encode"), ("prefill", "prefill")):
        found["work"] += _change(report.get(stage), name, in_flops)
    found["memory"] += _change(report.get("cache"), "key-value cache", in_bytes)
    if report.get("peak_memory"):
        peak, kind = float(report["peak_memory"]), report.get("memory_kind") or "peak"
        found["memory"].append(Measure(f"peak, {kind}", peak, None, in_bytes(peak), bar=False))
    return {name: rows for name, rows in found.items() if rows}


def _change(entry: Any, name: str, write: Any) -> list[Measure]:
    if not entry:
        return []
    before, after = float(entry["before"]), float(entry["after"])
    text = write(before)
    if before != after:
        text = f"{text} \N{RIGHTWARDS ARROW} {write(after)} ({in_percent(after / before if before else 1.0)})"
    return [Measure(name, after, before, text)]


def legend(found: Sequence[State]) -> list[tuple[str, str]]:
    """(class, words) of the patch states that occur."""
    words = {
        CellState.KEPT: ("kept", "kept"),
        CellState.MERGED: ("merged", "merged into a kept patch, coloured by group"),
        CellState.LEFT: ("left", "entered the LLM and left at a cut"),
        CellState.DROPPED: ("dropped", "dropped"),
        CellState.ABSENT: ("absent", "left out by the model's own processor"),
    }
    return [entry for state, entry in words.items() if any(one.count(state) for one in found)]
