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

QUESTIONS, CONVERSATIONS, PREFERENCES = "questions.jsonl", "conversations.jsonl", "preferences.jsonl"


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
    """Write ``videos/*.mp4`` and questions about them into a folder; clips that are there already are kept.

    The same questions come three times: ``questions.jsonl`` for benchmarks, ``conversations.jsonl`` and
    ``preferences.jsonl`` for training, in the public formats of LLaVA and LLaVA-Hound (the rejected answer is another
    candidate).

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
        ``questions.jsonl``: one question per line with ``id``, ``clip``, ``video`` (relative), ``family``,
        ``question``, ``candidates``, ``answer`` and ``fps``.
    """
    asked = items(split, clips, families, per_clip=per_clip, frames=frames)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, object]]] = {QUESTIONS: [], CONVERSATIONS: [], PREFERENCES: []}
    last = ""
    for item in asked:
        name = f"videos/{item.clip}-{frames}.mp4"
        if item.clip != last:
            if not (folder / name).exists():
                pictures, rate = item.read_frames()
                write_mp4(folder / name, pictures, rate)
            on_clip()
            last = item.clip
        rows[QUESTIONS].append(_row(item, name))
        rows[CONVERSATIONS].append(_conversation(item, name))
        rows[PREFERENCES].append(_preference(item, name))
    for file, found in rows.items():
        part = (folder / file).with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        part.replace(folder / file)
    return folder / QUESTIONS


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


def _conversation(item: WorldItem, video: str) -> dict[str, object]:
    said = [{"from": "human", "value": f"<video>\n{item.question}"}, {"from": "gpt", "value": item.answer}]
    return {"id": item.id, "video": video, "conversations": said}


def _preference(item: WorldItem, video: str) -> dict[str, object]:
    others = [word for word in item.candidates if word != item.answer]
    rejected = others[int(np.random.default_rng((*item.scene.seed, 4)).integers(len(others)))]
    return {"id": item.id, "video": video, "prompt": item.question, "chosen": item.answer, "rejected": rejected}


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
