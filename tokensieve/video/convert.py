"""From a decoded frame to an upright RGB picture of the wanted size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tokensieve.errors import VideoError

# Largest picture that is read, pixels: four times 8K.
MAX_FRAME_PIXELS = 1 << 27

_WHITE = 255


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a stored picture upright: transpose first, then flip.

    Attributes
    ----------
    transpose : bool
        Whether rows and columns change places.
    flip_x, flip_y : bool
        Whether the result is mirrored left to right, and top to bottom.
    """

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether the picture is mirrored besides being rotated."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    @property
    def rotation(self) -> int:
        """Counter-clockwise rotation in degrees, applied after a left-right mirror if ``mirrored``."""
        if self.transpose:
            return 90 if self.flip_y ^ self.mirrored else 270
        return 180 if self.flip_y else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of the upright picture."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn a picture [H, W, 3] upright; the result is a view."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


@dataclass(frozen=True)
class SizeLimits:
    """Bounds on the pictures that are returned.

    Attributes
    ----------
    max_pixels : int, optional
        Most pixels per frame.
    longest_edge : int, optional
        Longest side, pixels.
    max_memory : int
        Most bytes of all frames together.
    """

    max_pixels: int | None = None
    longest_edge: int | None = None
    max_memory: int = 8 << 30

    def __post_init__(self) -> None:
        for name in ("max_pixels", "longest_edge", "max_memory"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value >= 1):
                raise VideoError(f"{name} must be 1 or more, not {value!r}.")

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to scale a picture to: the same proportions, never larger."""
        scale = 1.0
        if self.max_pixels is not None:
            scale = min(scale, math.sqrt(self.max_pixels / (width * height)))
        if self.longest_edge is not None:
            scale = min(scale, self.longest_edge / max(width, height))
        if scale >= 1.0:
            return width, height
        scaled_width, scaled_height = max(round(width * scale), 1), max(round(height * scale), 1)
        if self.max_pixels is not None and scaled_width * scaled_height > self.max_pixels:
            scaled_width, scaled_height = max(int(width * scale), 1), max(int(height * scale), 1)
        return scaled_width, scaled_height

    def check(self, frames: int, width: int, height: int) -> None:
        """Raise VideoError if so many frames of this size need more than ``max_memory``."""
        needed = frames * width * height * 3
        if needed > self.max_memory:
            raise VideoError(
                f"{frames} frames of {width}x{height} need {needed / 2**30:.1f} GiB, more than max_memory="
                f"{self.max_memory / 2**30:.1f} GiB; ask for fewer frames, set max_pixels or raise it."
            )


def orientation_of(frame: Any) -> tuple[Orientation, str | None]:
    """Read how a decoded frame is to be turned from its display matrix.

    The matrix maps a stored pixel (p, q) to (a p + c q, b p + d q), with x to the right and y down.

    Parameters
    ----------
    frame : av.VideoFrame
        Any frame of the stream.

    Returns
    -------
    orientation : Orientation
    problem : str or None
        A warning if the angle is no multiple of 90 degrees; the nearest one is taken.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or len(bytes(data)) < 36:
        return Orientation(), None
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), dtype=np.int32)[:5])
    transpose = abs(b) + abs(c) > abs(a) + abs(d)
    problem = None
    if min(abs(a) + abs(d), abs(b) + abs(c)) > 0.01 * (abs(a) + abs(b) + abs(c) + abs(d)):
        problem = "the display rotation is no multiple of 90 degrees; the nearest one was applied"
    if transpose:
        return Orientation(True, c < 0, b < 0), problem
    return Orientation(False, a < 0, d < 0), problem


def to_rgb(frame: Any, width: int, height: int) -> NDArray[np.uint8]:
    """Convert a decoded frame to RGB of a given size, transparent parts on white.

    Colours are converted the way ``frame.to_ndarray(format="rgb24")`` does, so frames equal those that other
    PyAV based readers give.

    Parameters
    ----------
    frame : av.VideoFrame
        Decoded frame of any pixel format.
    width, height : int
        Wanted size as stored, before rotation.

    Returns
    -------
    ndarray [height, width, 3], uint8

    Raises
    ------
    VideoError
        If FFmpeg has no conversion for the pixel format.
    """
    see_through = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    same_size = (frame.width, frame.height) == (width, height)
    size: dict[str, Any] = {} if same_size else {"width": width, "height": height, "interpolation": "BICUBIC"}
    try:
        pixels: NDArray[np.uint8] = frame.reformat(format="rgba" if see_through else "rgb24", **size).to_ndarray()
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(
            f"pixel format {frame.format.name} cannot be converted to RGB; convert the video to yuv420p first."
        ) from error
    return on_white(pixels) if see_through else pixels


def on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay an RGBA picture [H, W, 4] over a white background, giving RGB [H, W, 3]."""
    alpha = pixels[..., 3:].astype(np.uint16)
    if (alpha == _WHITE).all():
        return pixels[..., :3]
    blended = (pixels[..., :3] * alpha + _WHITE * (_WHITE - alpha) + _WHITE // 2) // _WHITE
    return blended.astype(np.uint8)
