"""The motivation of the VidCom2 article on the bundled model: redundant frames can go, unique frames cannot.

    python -m benchmarks.unique_frames [--clips 200]

Frames of a clip of 32 are ranked by VidCom2's frame uniqueness (arXiv 2505.14454, section 3). All visual tokens of the
most redundant, the most unique, or random frames are removed in front of the language model; nothing else changes.
Writes a table and ``docs/img/unique_frames.svg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import matplotlib
import numpy as np
import torch

from benchmarks.results import RESULTS, machine, show, write
from tokensieve import compress
from tokensieve.bench.statistics import accuracy, sign_flip
from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.sample import TokenSample
from tokensieve.load import load_model
from tokensieve.ops.uniqueness import frame_uniqueness, gaussian_scores, low_variance_channels
from tokensieve.world import WorldItem, items

matplotlib.use("svg")
from matplotlib import pyplot

FRAMES = 32
REMOVED = (0, 4, 8, 16, 24)
EVENTS = ("order", "moment", "one-frame")
FIGURE = Path(__file__).parents[1] / "docs" / "img" / "unique_frames.svg"

Order = Literal["redundant", "unique", "random"]
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
            return torch.randperm(sample.frames, generator=torch.Generator().manual_seed(sample.index))
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
    asked = items("test", chosen.clips, per_clip=4, frames=FRAMES)
    model, processor = load_model("bundled", "float32")
    right: dict[tuple[Order, int], list[bool]] = {}
    for order in LABELS:
        for remove in REMOVED:
            if remove == 0 and order != "redundant":
                right[order, 0] = right["redundant", 0]
            else:
                right[order, remove] = _answers(model, processor, asked, WithoutFrames(remove=remove, order=order))
    rows = [
        _row(order, remove, asked, right) for order in LABELS for remove in REMOVED if remove or order == "redundant"
    ]
    columns = ("frames removed of 32", "which", "all families", "95 %", "order, moment, one-frame", "p against full")
    title = f"Frames removed by uniqueness: {chosen.clips} test clips of {FRAMES} frames, {len(asked)} questions"
    table = [_cells(row) for row in rows]
    show(title, columns, table)
    notes = ["p: exact sign-flip test over clips, all families, against the full model."]
    write(chosen.output, "unique_frames", {"machine": machine(), "rows": rows}, title, [("", columns, table)], notes)
    _draw(rows, chosen.figure)


def _answers(model: Any, processor: Any, asked: Sequence[WorldItem], method: Method) -> list[bool]:
    found: list[bool] = []
    for begin in range(0, len(asked), 4):
        some = asked[begin : begin + 4]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": item.question}]}],
                add_generation_prompt=True,
            )
            for item in some
        ]
        videos = [item.read_frames()[0] for item in some]
        inputs = processor(text=texts, videos=videos, padding=True, padding_side="left", return_tensors="pt")
        with torch.inference_mode(), compress(model, method):
            produced = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said = processor.batch_decode(produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() == item.answer for text, item in zip(said, some, strict=True)]
    return found


def _row(
    order: Order, remove: int, asked: Sequence[WorldItem], right: dict[tuple[Order, int], list[bool]]
) -> dict[str, Any]:
    hits, full = right[order, remove], right["redundant", 0]
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
