"""Accuracy of the bundled video LLM on unseen clips, beside chance and two models that do not look.

    python -m benchmarks.world_accuracy [--clips 500] [--frames 16]

No method and none of our hooks takes part: plain ``generate`` of transformers. The blind rows are the same model on
grey frames, and a table of how often each answer followed the same words in 20000 training clips.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import RESULTS, machine, show, write
from tokensieve.bench.statistics import accuracy
from tokensieve.load import load_model
from tokensieve.world import FAMILIES, WorldItem, items, questions, scene_of

NOTES = (
    "blind: words = the most frequent answer to the same question in 20000 training clips; blind: grey frames = the "
    "same model on frames without content; shuffled frames = the same model on frames in random order.",
    "Intervals are Wilson's, one question of a family per clip.",
)

Look = Callable[[np.ndarray], np.ndarray]

COLUMNS = ("family", "questions", "chance", "blind: words", "blind: grey frames", "shuffled frames", "accuracy", "95 %")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write ``results/world_accuracy.{md,json}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="world_accuracy")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    asked = items(chosen.split, chosen.clips, per_clip=len(FAMILIES), frames=chosen.frames)
    model, processor = load_model(chosen.model, "float32")
    shuffle = np.random.default_rng(0)
    looks: dict[str, Look] = {
        "accuracy": lambda frames: frames,
        "grey": lambda frames: np.full_like(frames, 90),
        "shuffled": lambda frames: frames[shuffle.permutation(len(frames))],
    }
    right = {name: _answers(model, processor, asked, look) for name, look in looks.items()}
    right["words"] = _by_words(asked)
    rows = [_row(family, asked, right) for family in FAMILIES]
    rows.append(_mean(rows))
    title = f"Accuracy of the bundled video LLM: {chosen.clips} {chosen.split} clips of {chosen.frames} frames"
    table = [_cells(row) for row in rows]
    show(title, COLUMNS, table)
    payload = {"machine": machine(), "clips": chosen.clips, "frames": chosen.frames, "rows": rows}
    write(chosen.output, chosen.name, payload, title, [("", COLUMNS, table)], NOTES)


def _answers(model: Any, processor: Any, asked: Sequence[WorldItem], look: Look, batch: int = 10) -> list[bool]:
    """Whether each question is answered right, its frames changed by ``look`` first."""
    found: list[bool] = []
    for begin in range(0, len(asked), batch):
        some = asked[begin : begin + batch]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": item.question}]}],
                add_generation_prompt=True,
            )
            for item in some
        ]
        videos = [look(item.read_frames()[0]) for item in some]
        inputs = processor(text=texts, videos=videos, padding=True, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            produced = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said = processor.batch_decode(produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() == item.answer for text, item in zip(said, some, strict=True)]
    return found


def _by_words(asked: Sequence[WorldItem], clips: int = 20_000) -> list[bool]:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(clips):
        for found in questions(scene_of("train", index)).values():
            for question in found:
                seen[question.text][question.answer] += 1
    guesses = [seen[item.question] or Counter(item.candidates) for item in asked]
    return [guess.most_common(1)[0][0] == item.answer for guess, item in zip(guesses, asked, strict=True)]


def _row(family: str, asked: Sequence[WorldItem], right: dict[str, list[bool]]) -> dict[str, Any]:
    chosen = [i for i, item in enumerate(asked) if item.family == family]
    estimate = accuracy([(int(right["accuracy"][i]), 1) for i in chosen])
    return {
        "family": family,
        "questions": len(chosen),
        "chance": float(np.mean([1 / len(asked[i].candidates) for i in chosen])),
        **{name: float(np.mean([hits[i] for i in chosen])) for name, hits in right.items()},
        "low": estimate.low,
        "high": estimate.high,
    }


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The average over families, each counting the same."""
    shares = ("chance", "words", "grey", "shuffled", "accuracy")
    found: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in shares}
    return {"family": "mean", "questions": sum(row["questions"] for row in rows), **found, "low": None, "high": None}


def _cells(row: dict[str, Any]) -> list[str]:
    interval = "" if row["low"] is None else f"{row['low']:.1%} to {row['high']:.1%}"
    names = ("chance", "words", "grey", "shuffled", "accuracy")
    return [row["family"], str(row["questions"]), *(f"{row[name]:.1%}" for name in names), interval]


if __name__ == "__main__":
    main()
