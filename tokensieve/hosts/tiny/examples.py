"""Synthetic clips and ready prompts for tests and the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from tokensieve.errors import HostError
from tokensieve.hosts.tiny.families import family_of

__all__ = ["example_inputs", "example_messages", "synthetic_clip", "synthetic_image"]

FRAME_SIZE = (112, 168)
"""Height and width of synthetic frames: not square, so that swapped axes show."""

_QUESTIONS = (
    "What happens in the video?",
    "Describe the motion of the square, please answer with one word.",
    "Where is the ball at the end of the clip, left or right?",
    "Which shape disappears first, and what is shown on the left side of the frame before it turns?",
)


def synthetic_clip(frames: int = 4, *, seed: int = 0, size: tuple[int, int] = FRAME_SIZE) -> np.ndarray:
    """Render shapes that move over a still, textured ground.

    Parameters
    ----------
    frames : int
        Number of frames, one or more.
    seed : int
        Fixes ground, shapes, colours and motion; other seeds give clearly other clips.
    size : tuple of int
        Height and width in pixels.

    Returns
    -------
    np.ndarray
        uint8 ``[frames, height, width, 3]``. Ground pixels away from the shapes are equal in all frames.
    """
    if frames < 1:
        raise HostError(f"A clip needs at least one frame, got {frames}; ask for one or more.")
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    ground = rng.uniform(60, 180, 3) * np.ones((height, width, 3))
    for _ in range(3):
        angle, period, phase = rng.uniform(0, np.pi), rng.uniform(9, 40), rng.uniform(0, 2 * np.pi)
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period + phase)
        ground += wave[..., None] * rng.uniform(-25, 25, 3)
    clip = np.repeat(ground[None], frames, axis=0)
    for shape in range(3):
        radius = min(size) * rng.uniform(0.12, 0.22)
        start = rng.uniform(0.2, 0.8, 2) * size
        step = rng.uniform(0.04, 0.1, 2) * size * rng.choice([-1, 1], 2)
        colour = rng.uniform(0, 255, 3)
        for index in range(frames):
            centre = np.mod(start + index * step, size)
            down, across = np.abs(rows - centre[0]), np.abs(columns - centre[1])
            inside = np.maximum(down, across) < radius if shape % 2 else np.hypot(down, across) < radius
            clip[index][inside] = colour
    return clip.clip(0, 255).astype(np.uint8)


def synthetic_image(*, seed: int = 0, size: tuple[int, int] = FRAME_SIZE) -> Image.Image:
    """Render one still picture, the first frame of the clip of that seed."""
    return Image.fromarray(synthetic_clip(1, seed=seed, size=size)[0])


def example_messages(
    family: str,
    *,
    videos: int = 1,
    frames: int = 4,
    images: int = 0,
    question: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Build one user message with videos and images in it, in the form that `apply_chat_template` takes.

    Parameters
    ----------
    family : str
        Slug of the family. Where it knows no videos, an image takes the place of each.
    videos, frames, images : int
        How many of each; videos come before images, the question last.
    question : str, optional
        Text of the message; a question about moving shapes unless given.
    seed : int
        Fixes what is seen.

    Returns
    -------
    list of dict
        One message; clips are uint8 arrays ``[frames, height, width, 3]``, images are PIL images.
    """
    traits = family_of(family)
    if not traits.videos:
        videos, images = 0, videos + images
    content: list[dict[str, Any]] = [
        {"type": "video", "video": synthetic_clip(frames, seed=10 * seed + index)} for index in range(videos)
    ]
    content += [{"type": "image", "image": synthetic_image(seed=10 * seed + 5 + index)} for index in range(images)]
    content.append({"type": "text", "text": _QUESTIONS[0] if question is None else question})
    return [{"role": "user", "content": content}]


def example_inputs(
    family: str,
    processor: ProcessorMixin,
    *,
    videos: int = 1,
    frames: int = 4,
    images: int = 0,
    question: str | None = None,
    batch: int = 1,
    seed: int = 0,
    padding_side: str = "left",
    uneven: bool = True,
    row: int | None = None,
) -> BatchFeature:
    """Prepare model inputs of synthetic prompts, ready for `model(**inputs)` and `model.generate(**inputs)`.

    Parameters
    ----------
    family : str
        Slug of the family.
    processor : ProcessorMixin
        The processor of its checkpoint.
    videos, frames, images : int
        How many videos, frames per video and images each prompt holds.
    question : str, optional
        Question of the first row (of all rows unless `uneven`); a fixed one unless given.
    batch : int
        Number of rows; every row sees other clips.
    seed : int
        Fixes the clips of the whole batch.
    padding_side : str
        ``"left"`` or ``"right"``.
    uneven : bool
        Give the rows questions of different lengths and, where the family can batch that, clips of
        different lengths (two frames more per row).
    row : int, optional
        Prepare this row of the batch alone, without padding: the reference for the padded batch.

    Returns
    -------
    BatchFeature
        Tensors on the CPU.
    """
    traits = family_of(family)
    rows: Sequence[int] = range(batch) if row is None else [row]
    conversations = []
    for index in rows:
        asked = _QUESTIONS[index % len(_QUESTIONS)] if uneven and index else (question or _QUESTIONS[0])
        extra = 2 * index if uneven and traits.uneven_frames else 0
        conversations.append(
            example_messages(
                family,
                videos=videos,
                frames=frames + extra,
                images=images,
                question=asked,
                seed=100 * seed + index,
            )
        )
    return _encode(processor, conversations, padding_side)


def _encode(processor: ProcessorMixin, conversations: list[list[dict[str, Any]]], padding_side: str) -> BatchFeature:
    """Run a processor over conversations whose visuals are in memory, without frame sampling."""
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in conversations]
    parts = [[part for message in chat for part in message["content"]] for chat in conversations]
    clips = [part["video"] for row in parts for part in row if part["type"] == "video"]
    images = [[part["image"] for part in row if part["type"] == "image"] for row in parts]
    arguments: dict[str, Any] = {}
    if any(images):
        arguments["images"] = images
    if clips:
        arguments["videos"] = clips
        arguments["do_sample_frames"] = False
        arguments["video_metadata"] = [_metadata(clip) for clip in clips]
    return processor(
        text=texts,
        return_tensors="pt",
        padding=len(texts) > 1,
        padding_side=padding_side,
        **arguments,
    )


def _metadata(clip: np.ndarray, frames_per_second: float = 2.0) -> dict[str, Any]:
    """Say that the clip was sampled at two frames per second, as timestamps in prompts and positions need."""
    return {
        "total_num_frames": len(clip),
        "fps": frames_per_second,
        "duration": len(clip) / frames_per_second,
        "frames_indices": list(range(len(clip))),
        "height": clip.shape[1],
        "width": clip.shape[2],
    }
