"""Which frames of a clip training and evaluation see (PPLLaVA, code of the release)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokensieve.errors import VideoError

__all__ = ["central_indices", "folder_pictures", "frames_at", "random_indices", "read_frames", "video_facts"]

_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def random_indices(total: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """One random frame in each of ``count`` equal segments.

    Parameters
    ----------
    total : int
        Frames of the clip, at least 1.
    count : int
        Frames to take. A shorter clip gives all its frames and its last one again and again.
    generator : np.random.Generator
        Draws.

    Returns
    -------
    np.ndarray
        ``[count]`` int64, ascending.
    """
    if total <= count:
        return np.minimum(np.arange(count), total - 1)
    edges = np.linspace(0, total, count + 1).astype(np.int64)
    return generator.integers(edges[:-1], edges[1:])


def central_indices(
    last: int, count: int, *, first: int = 0, fps: float | None = None, start: float = 0.0, end: float | None = None
) -> NDArray[np.int64]:
    """Frames of evaluation: ``int(first + segment / 2 + round(segment * k))``.

    Parameters
    ----------
    last : int
        Index of the last frame.
    count : int
        Frames to take.
    first : int
        Index of the first frame.
    fps : float, optional
        Frames per second, needed with a range.
    start, end : float
        Range in seconds.

    Returns
    -------
    np.ndarray
        ``[count]`` int64, ascending; frames repeat in short clips.
    """
    low, high = float(first), float(last)
    if fps is not None:
        low = max(first, round(start * fps))
        high = last if end is None else min(round(end * fps), last)
    segment = (high - low) / count
    return np.array([int(low + segment / 2 + np.round(segment * k)) for k in range(count)], dtype=np.int64)


def read_frames(path: str | Path, count: int, generator: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """Frames of a video file, or of a folder of pictures.

    Parameters
    ----------
    path : str or Path
        Video or animation, or a folder whose pictures in the order of their names are the frames.
    count : int
        Frames to take.
    generator : np.random.Generator, optional
        For random frames; without it the central ones of evaluation.

    Returns
    -------
    np.ndarray
        ``[count, H, W, 3]``, 8 bits.

    Raises
    ------
    VideoError
        If nothing can be read.
    """
    place = Path(path)
    total = len(folder_pictures(place)) if place.is_dir() else video_facts(place)[0]
    wanted = central_indices(total - 1, count) if generator is None else random_indices(total, count, generator)
    return frames_at(place, wanted)


def video_facts(path: Path) -> tuple[int, float]:
    """Frames of a video, and how many a second; a still image has one."""
    from tokensieve.video import probe

    info: Any = probe(path)
    rate = info.average_fps or 0.0
    total = info.num_frames or (round(info.duration * rate) if rate else 1)
    return max(1, int(total)), rate or 1.0


def frames_at(path: Path, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Frames ``[len(indices), H, W, 3]`` of a video file or folder of pictures by their numbers, ascending.

    Raises
    ------
    VideoError
        If they cannot be read, or the pictures of a folder differ in size.
    """
    from tokensieve.video import read_clip

    distinct, place = np.unique(indices, return_inverse=True)
    if path.is_dir():
        return _pictures_at(path, distinct)[place]
    total, rate = video_facts(path)
    if total <= 2 * len(distinct):
        frames = read_clip(path, total).frames
        return frames[np.minimum(indices, len(frames) - 1)]
    # The middle of a frame's time, so that rounding cannot hit its neighbour; the last one is on screen to the end.
    times = (distinct + 0.5) / rate
    frames = read_clip(path, len(distinct), "timestamps", timestamps=times.tolist()).frames
    return frames[np.minimum(place, len(frames) - 1)]


def folder_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of their names.

    Raises
    ------
    VideoError
        If there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if not files:
        raise VideoError(f"The folder {folder} holds no pictures; give a video file or a folder of frames.")
    return files


def _pictures_at(folder: Path, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    from tokensieve.video import read_clip

    files = folder_pictures(folder)
    frames = [read_clip(files[index]).frames[0] for index in indices.tolist()]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise VideoError(f"The frames in {folder} differ in size ({sorted(shapes)[:2]}); give frames of one video.")
    return np.stack(frames)
