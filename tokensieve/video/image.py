"""Still images, and animations that FFmpeg does not play, read with Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokensieve.errors import VideoError
from tokensieve.video.clip import ClipInfo
from tokensieve.video.convert import MAX_FRAME_PIXELS, Orientation, SizeLimits, on_white
from tokensieve.video.decode import Progress
from tokensieve.video.source import OpenSource
from tokensieve.video.timeline import Timeline

_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
    b"P1",
    b"P2",
    b"P3",
    b"P4",
    b"P5",
    b"P6",
)
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_MILLISECOND = Fraction(1, 1000)
# Browsers show frames without a stated time for this long.
_DEFAULT_MILLISECONDS = 100
_ORIENTATION_TAG = 0x0112
_EXIF_ORIENTATIONS = {
    2: Orientation(False, True, False),
    3: Orientation(False, True, True),
    4: Orientation(False, False, True),
    5: Orientation(True, False, False),
    6: Orientation(True, True, False),
    7: Orientation(True, True, True),
    8: Orientation(True, False, True),
}


@dataclass(frozen=True)
class ImageFacts:
    """What is known about an image file before its frames are read."""

    info: ClipInfo
    timeline: Timeline
    orientation: Orientation
    stored_size: tuple[int, int]
    first: int


def is_image(opened: OpenSource) -> bool:
    """Tell from its first bytes whether an input is an image that Pillow reads (GIF is read as a video)."""
    head = opened.head
    if opened.label.lower().endswith((".mjpeg", ".mjpg")):
        return False
    if head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    return head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS


def inspect_image(opened: OpenSource) -> ImageFacts:
    """Read size, orientation and frame times of an image or animation.

    Raises
    ------
    VideoError
        If Pillow cannot read it, or it is too large.
    """
    with _open_image(opened) as image, _reading(opened):
        width, height = image.size
        # An animated PNG may carry a separate still as its first picture, which players do not show.
        first = int(bool(image.info.get("default_image"))) if getattr(image, "n_frames", 1) > 1 else 0
        # Further pages of a TIFF or views of an MPO are not moments in time.
        animated = getattr(image, "is_animated", False) and image.format not in ("TIFF", "MPO")
        count = getattr(image, "n_frames", 1) - first if animated else 1
        orientation = _EXIF_ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG, 1), Orientation())
        durations, warnings = _durations(image, first, count) if count > 1 else ([0], [])
        ticks = np.concatenate(([0], np.cumsum(durations)[:-1])).astype(np.int64)
        timeline = Timeline(ticks, np.arange(len(ticks)) == 0, _MILLISECOND, durations[-1] / 1000)
        total = float(sum(durations)) / 1000
        shown_width, shown_height = orientation.size(width, height)
        info = ClipInfo(
            label=opened.label,
            width=shown_width,
            height=shown_height,
            rotation=orientation.rotation,
            mirrored=orientation.mirrored,
            average_fps=len(ticks) / total if len(ticks) > 1 and total else None,
            duration=total,
            num_frames=len(ticks),
            num_frames_kind="exact",
            codec=(image.format or "").lower(),
            container=(image.format or "").lower(),
            pix_fmt=image.mode,
            is_image=len(ticks) == 1,
            variable_frame_rate=timeline.variable_rate,
            time_base=_MILLISECOND,
            warnings=warnings,
        )
        return ImageFacts(info, timeline, orientation, (width, height), first)


def read_image(
    opened: OpenSource,
    facts: ImageFacts,
    wanted: NDArray[np.int64],
    limits: SizeLimits,
    progress: Progress | None,
) -> NDArray[np.uint8]:
    """Read frames of an image or animation.

    Parameters
    ----------
    opened : OpenSource
        The input.
    facts : ImageFacts
        Result of :func:`inspect_image`.
    wanted : ndarray [U], int64
        Ascending, distinct frame indices.
    limits : SizeLimits
        Bounds on size.
    progress : callable, optional
        Called with (frames so far, frames wanted).

    Returns
    -------
    ndarray [U, H, W, 3], uint8
    """
    stored = limits.target(*facts.stored_size)
    width, height = facts.orientation.size(*stored)
    limits.check(len(wanted), width, height)
    frames = np.empty((len(wanted), height, width, 3), dtype=np.uint8)
    with _open_image(opened) as image:
        for slot, index in enumerate(wanted):
            with _reading(opened):
                if len(facts.timeline) > 1:
                    image.seek(int(index) + facts.first)
                frames[slot] = facts.orientation.apply(_pixels(image, stored))
            if progress is not None:
                progress(slot + 1, len(wanted))
    return frames


@contextmanager
def _reading(opened: OpenSource) -> Iterator[None]:
    """Turn whatever a Pillow plug-in raises on damaged data into one sentence."""
    try:
        yield
    except VideoError:
        raise
    except UnidentifiedImageError as error:
        raise VideoError(
            f"{opened.label} is an image that cannot be read (damaged, or a format such as HEIC); "
            "convert it to JPEG or PNG."
        ) from error
    except Image.DecompressionBombError as error:
        raise VideoError(f"{opened.label} has too many pixels; scale it down.") from error
    # The plug-ins keep to no list: OSError, SyntaxError, RuntimeError, struct.error, IndexError were seen.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise VideoError(f"{opened.label} is a damaged image ({reason}); check that it is complete.") from error


@contextmanager
def _open_image(opened: OpenSource) -> Iterator[Image.Image]:
    with _reading(opened):
        image = Image.open(opened.rewound(), formats=_available_formats())
    with image:
        if image.width * image.height > MAX_FRAME_PIXELS:
            size = f"{image.width}x{image.height}"
            raise VideoError(f"{opened.label} has {size} pixels, which is too large; scale it down.")
        yield image


def _available_formats() -> list[str]:
    """Formats of our list that this Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _durations(image: Image.Image, first: int, count: int) -> tuple[list[int], list[str]]:
    """Milliseconds that each frame is shown; some formats tell only when the frame is decoded."""
    durations: list[int] = []
    for place in range(first, first + count):
        try:
            image.seek(place)
            image.load()
        except Exception as error:
            if not durations:
                raise
            return durations, [f"the animation is damaged after {len(durations)} of {count} frames ({error})"]
        durations.append(max(round(float(image.info.get("duration") or _DEFAULT_MILLISECONDS)), 1))
    return durations, []


def _pixels(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Convert the current frame to RGB [H, W, 3] of a given (width, height), transparent parts on white."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion would cut 16-bit grey off at 255 instead of scaling it.
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" or values.max() > 1.0 else 1.0
        grey = np.rint(np.clip(values / top, 0.0, 1.0) * 255).astype(np.uint8)
        picture = Image.fromarray(grey).convert("RGB")
    elif image.has_transparency_data:
        picture = Image.fromarray(on_white(np.asarray(image.convert("RGBA"))))
    else:
        picture = image.convert("RGB")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(picture)
