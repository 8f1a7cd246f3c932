"""The motivation of the VidCom2 article on the bundled model: redundant frames can go, unique frames cannot.

    python -m benchmarks.unique_frames [--clips 200]

Frames of a clip of 32 are ranked by VidCom2's frame uniqueness (arXiv 2505.14454, section 3). All visual tokens of the
most redundant, the most unique, or random frames are removed in front of the language model; nothing else changes.
Writes a table and ``docs/img/unique_frames.svg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import matplotlib
import numpy as np
import torch
from rich.progress import track

from benchmarks.results import RESULTS, machine, show, write
from tokensieve.bench.asking import answer, is_right
from tokensieve.bench.data import Item, by_clip, clip_of, item_like
from tokensieve.bench.encoding import given, record
from tokensieve.bench.statistics import accuracy, sign_flip
from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.runtime import Run
from tokensieve.core.sample import TokenSample
from tokensieve.hosts.registry import host_for
from tokensieve.load import load_model
from tokensieve.ops.uniqueness import frame_uniqueness, gaussian_scores, low_variance_channels
from tokensieve.prompt import build_prompt
from tokensieve.world import items

matplotlib.use("svg")
from matplotlib import pyplot

FRAMES = 32
REMOVED = (0, 4, 8, 16, 24)
EVENTS = ("order", "moment", "one-frame")
FIGURE = Path(__file__).parents[1] / "docs" / "img" / "unique_frames.svg"

Order = Literal["redundant", "unique", "random"]
FULL: tuple[Order, int] = ("redundant", 0)
LABELS: dict[Order, str] = {
    "redundant": "most redundant frames removed",
    "random": "random frames removed",
    "unique": "most unique frames removed",
}


@dataclass
class WithoutFrames(Method):
    """Removes whole frames in an order that VidCom2's frame uniqueness gives."""

    remove: int = 0
    order: Order = "redundant"

    name: ClassVar[str] = "without-frames"
    title: ClassVar[str] = "Without some frames"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "prune"
    fidelity: ClassVar[Fidelity] = "control"

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Keep all tokens of the frames that stay."""
        ranked = self._ranked(sample)
        stay = ranked[self.remove :].sort().values
        idx = torch.arange(sample.layout.patches).view(sample.frames, -1)
        return Plan(idx[stay].flatten())

    def _ranked(self, sample: TokenSample) -> torch.Tensor:
        """Frames, the first to go first."""
        if self.order == "random":
            return torch.randperm(sample.frames)
        features = sample.features.view(sample.frames, -1, sample.features.shape[-1])
        to_video, _ = gaussian_scores(features, low_variance_channels(features))
        return frame_uniqueness(to_video).argsort(descending=self.order == "unique")

    def token_count(self, layout: Layout) -> int:
        """Tokens of the frames that stay."""
        return layout.patches * (len(layout.views) - self.remove) // len(layout.views)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    chosen = parser.parse_args(arguments)
    asked = [item_like(one) for one in items("test", chosen.clips, per_clip=4, frames=FRAMES)]
    model, processor = load_model("bundled", "float32")
    keys: list[tuple[Order, int]] = [FULL, *((order, remove) for order in LABELS for remove in REMOVED if remove)]
    host = host_for(model)
    runs = {key: Run(model, host, [WithoutFrames(remove=key[1], order=key[0])]) for key in keys}
    right: dict[tuple[Order, int], list[bool]] = {key: [] for key in keys}
    torch.manual_seed(0)
    for clip in track(list(by_clip(asked).values()), "clips"):
        for key, hits in _clip_answers(model, processor, clip, runs).items():
            right[key] += hits
    asked = [item for clip in by_clip(asked).values() for item in clip]
    rows = [_row(order, remove, asked, right) for order, remove in keys]
    columns = ("frames removed of 32", "which", "all families", "95 %", "order, moment, one-frame", "p against full")
    title = f"Frames removed by uniqueness: {chosen.clips} test clips of {FRAMES} frames, {len(asked)} questions"
    table = [_cells(row) for row in rows]
    show(title, columns, table)
    notes = ["p: exact sign-flip test over clips, all families, against the full model."]
    write(chosen.output, "unique_frames", {"machine": machine(), "rows": rows}, title, [("", columns, table)], notes)
    _draw(rows, chosen.figure)


def _clip_answers(
    model: Any, processor: Any, asked: Sequence[Item], runs: Mapping[tuple[Order, int], Run]
) -> dict[tuple[Order, int], list[bool]]:
    """Which of the questions about one clip every run answers rightly; the clip is encoded once."""
    clip, texts = clip_of(asked[0]), [item.question for item in asked]
    inputs = build_prompt(processor, clip, texts, whole_frames=True).on(model)
    single = build_prompt(processor, clip, texts[:1], whole_frames=True).on(model)
    with runs[FULL] as full:
        encoding = record(full, single)
    found = {}
    for key, run in runs.items():
        with run, given(run, encoding, len(asked)):
            said = answer(model, processor.tokenizer, inputs, asked, "open")
        found[key] = [is_right(text, item) for text, item in zip(said, asked, strict=True)]
    return found


def _row(
    order: Order, remove: int, asked: Sequence[Item], right: dict[tuple[Order, int], list[bool]]
) -> dict[str, Any]:
    hits, full = right[order, remove], right[FULL]
    clips: dict[str, list[tuple[int, int]]] = {}
    for item, hit, before in zip(asked, hits, full, strict=True):
        clips.setdefault(item.clip, []).append((int(hit), int(before)))
    estimate = accuracy([(sum(hit for hit, _ in pairs), len(pairs)) for pairs in clips.values()])
    events = [hit for item, hit in zip(asked, hits, strict=True) if item.family in EVENTS]
    return {
        "order": order,
        "removed": remove,
        "accuracy": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "events": float(np.mean(events)),
        "p": sign_flip([sum(hit - before for hit, before in pairs) for pairs in clips.values()]),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    which = "none (full model)" if row["removed"] == 0 else LABELS[row["order"]].removesuffix(" frames removed")
    interval = f"{row['low']:.1%} to {row['high']:.1%}"
    chance = "" if row["removed"] == 0 else f"{row['p']:.2g}"
    return [str(row["removed"]), which, f"{row['accuracy']:.1%}", interval, f"{row['events']:.1%}", chance]


def _draw(rows: Sequence[dict[str, Any]], target: Path) -> None:
    full = next(row for row in rows if row["removed"] == 0)
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for panel, key, title in zip(
        panels, ("accuracy", "events"), ("all questions", "order, moment, one-frame"), strict=True
    ):
        for order, label in LABELS.items():
            line = [full, *(row for row in rows if row["order"] == order and row["removed"])]
            panel.plot([row["removed"] for row in line], [100 * row[key] for row in line], marker="o", label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("frames removed of 32")
        panel.set_xticks(REMOVED)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy in %")
    panels[0].legend(frameon=False, fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
