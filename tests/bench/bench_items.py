"""A small model and a fake dataset."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from tokensieve.bench.data import Item
from tokensieve.hosts import tiny

FAMILIES = ("colour", "count", "order")
SIZE, FRAMES = 40, 6


@functools.cache
def loaded(family: str = "llava_onevision") -> tuple[Any, Any]:
    """A tiny float32 model in evaluation mode and its processor."""
    model, processor = tiny.load(family)
    return model.eval(), processor


@functools.cache
def frames_of(clip: int) -> np.ndarray:
    """Noise that differs from clip to clip, uint8 [F, H, W, 3]."""
    return np.random.default_rng(clip).integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)


def item(clip: int, number: int, **fields: Any) -> Item:
    """Question ``number`` about a clip."""
    given: dict[str, Any] = {
        "id": f"clip-{clip}/{number}",
        "clip": f"clip-{clip}",
        "family": FAMILIES[(clip + number) % len(FAMILIES)],
        "question": f"What is thing {number} in scene {clip}?",
        "candidates": ("red", "green", "blue"),
        "answer": ("red", "green", "blue")[(clip * 2 + number) % 3],
        "read_frames": functools.partial(_read, clip),
    }
    return Item(**{**given, **fields})


def _read(clip: int) -> tuple[np.ndarray, float]:
    return frames_of(clip), 4.0


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
