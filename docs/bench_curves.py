"""Draws ``docs/img/world_bench.svg``: accuracy over the share of tokens kept, in the committed benchmark.

python docs/bench_curves.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from tokensieve.core.registry import method_class

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "world_bench" / "results.json"
PANELS = (
    "inside the LLM, or with more tokens than asked",
    "in front of the LLM: leave tokens out",
    "in front of it: merge",
)
CONTROLS = {"random": "--", "frame-subsample": ":"}
COLOURS = ("#1f77b4", "#d95f02", "#2a8f2a", "#c22f2f", "#7a52b3", "#8c564b", "#d1469f", "#5f5f5f", "#8f8f00", "#0f9aa8")
LOWEST = 20
LABEL_STEP = 2.9
"""Least distance of two labels, in points of accuracy."""


def panel_of(rows: list[dict[str, Any]]) -> int:
    """Which panel shows a method."""
    method = method_class(rows[0]["method"])
    if "decoder" in method.stages and "tokens" not in method.stages:
        return 0
    if rows[0]["achieved"] > 1.2 * rows[0]["retention"]:
        return 0
    return 1 if method.kind == "prune" else 2


def spread(heights: list[float], low: float) -> list[float]:
    """Heights of labels, given from the top down, moved apart and kept above ``low``."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = min(placed[i], placed[i - 1] - LABEL_STEP)
    floor = low
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], floor)
        floor = placed[i] + LABEL_STEP
    return placed


def draw(panel: Any, lines: dict[str, list[dict[str, Any]]], shares: list[float]) -> None:
    """One panel: lines with their names at the right end."""
    places = {share: place for place, share in enumerate(shares)}
    order = sorted(lines, key=lambda name: -lines[name][-1]["accuracy"]["value"])
    heights = spread([100 * lines[name][-1]["accuracy"]["value"] for name in order], LOWEST + 1)
    for number, (name, height) in enumerate(zip(order, heights, strict=True)):
        across = [places[row["retention"]] for row in lines[name]]
        values = [100 * row["accuracy"]["value"] for row in lines[name]]
        control = name in CONTROLS
        colour = "black" if control else COLOURS[number % len(COLOURS)]
        panel.plot(across, values, CONTROLS.get(name, "-"), marker="o", markersize=3, linewidth=1.4, color=colour)
        panel.annotate(
            name, (across[-1], values[-1]), (len(shares) - 0.85, height), fontsize=7, va="center", color=colour,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour},
        )  # fmt: skip
    panel.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    panel.set_xlim(-0.2, len(shares) + 0.9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)


def main() -> None:
    """Write the picture."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found["rows"]:
        if row["retention"] is not None:
            lines[row["method"]].append(row)
    for rows in lines.values():
        rows.sort(key=lambda row: -row["retention"])
    shares = sorted({row["retention"] for rows in lines.values() for row in rows}, reverse=True)
    full = 100 * next(row["accuracy"]["value"] for row in found["rows"] if row["retention"] is None)
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(13, 5.6), sharey=True, layout="constrained")
    for number, (panel, title) in enumerate(zip(panels, PANELS, strict=True)):
        shown = {name: rows for name, rows in lines.items() if name in CONTROLS or panel_of(rows) == number}
        draw(panel, shown, shares)
        panel.axhline(full, color="grey", linewidth=0.8)
        panel.text(-0.1, full + 0.6, "full model", fontsize=7, color="grey")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("visual tokens asked for")
    panels[0].set_ylim(LOWEST, 100)
    panels[0].set_ylabel("accuracy in %")
    figure.savefig(HERE / "img" / "world_bench.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
