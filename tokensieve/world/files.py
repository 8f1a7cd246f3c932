"""Writes clips of the world as video files with their questions beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tokensieve.world.items import FRAMES_PER_SECOND, WorldItem, items
from tokensieve.world.words import FAMILIES

QUESTIONS = "questions.jsonl"


def write_world(
    folder: Path,
    split: str = "test",
    clips: int = 200,
    families: Sequence[str] = FAMILIES,
    *,
    per_clip: int = 2,
    frames: int = 16,
    on_clip: Callable[[], object] = lambda: None,
) -> Path:
    """Write ``videos/*.mp4`` and ``questions.jsonl`` into a folder; clips that are there already are kept.

    Parameters
    ----------
    folder
        Made when missing.
    split, clips, families, per_clip, frames
        As for :func:`tokensieve.world.items.items`.
    on_clip
        Called after every clip, to show progress.

    Returns
    -------
    Path
        The JSONL file: one question per line with ``id``, ``clip``, ``video`` (relative), ``family``, ``question``,
        ``candidates``, ``answer`` and ``fps``.
    """
    asked = items(split, clips, families, per_clip=per_clip, frames=frames)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    lines = []
    last = ""
    for item in asked:
        name = f"videos/{item.clip}-{frames}.mp4"
        if item.clip != last:
            if not (folder / name).exists():
                pictures, rate = item.read_frames()
                write_mp4(folder / name, pictures, rate)
            on_clip()
            last = item.clip
        lines.append(json.dumps(_row(item, name)))
    target = folder / QUESTIONS
    part = target.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(target)
    return target


def _row(item: WorldItem, video: str) -> dict[str, object]:
    return {
        "id": item.id,
        "clip": item.clip,
        "video": video,
        "family": item.family,
        "question": item.question,
        "candidates": list(item.candidates),
        "answer": item.answer,
        "fps": FRAMES_PER_SECOND,
    }


def write_mp4(path: Path, frames: np.ndarray, rate: float) -> None:
    """Encode ``uint8 [F, H, W, 3]`` frames as H.264 in MP4, almost without loss; a kill leaves no broken file."""
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        # Colours carry answers here, so they are neither halved in resolution nor quantised coarsely.
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "10", "preset": "fast"}
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    part.replace(path)
