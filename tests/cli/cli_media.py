"""What several test files of the command line need: small videos, and the shape of an error."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from tokensieve.hosts import tiny

REAL_CLIPS = [
    "handheld_rotated180_vfr.mp4",
    "dog_bed_rotated90.mp4",
    "portrait_drummer.mp4",
    "bunny_square_vp9_642.webm",
    "pan_portrait_av1_10bit.mp4",
    "motion_photo_hevc_vfr_2tracks.mp4",
    "cartoon_pigs.gif",
    "seagulls_mpeg4.avi",
    "big_buck_bunny_0_30.webm",
    "bunny_h263_176x144.3gp",
]
"""Variable frame rate, rotated, portrait, VP8, VP9, AV1, HEVC and GIF files of the real clips."""


def error_line(stderr: str) -> str:
    """The error of a command, checked to be one line with nothing but notes before it."""
    *notes, last = stderr.rstrip("\n").split("\n")
    assert last.startswith("error: "), stderr
    assert all(line.startswith("note: ") for line in notes), stderr
    return last


def write_video(
    path: Path,
    count: int = 8,
    size: tuple[int, int] = (64, 96),
    options: dict[str, str] | None = None,
    milliseconds: list[int] | None = None,
) -> Path:
    """Encode moving shapes at two frames per second, or at the given presentation times."""
    with av.open(str(path), "w", container_options=options or {}) as output:
        stream: Any = output.add_stream("libx264", rate=2)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for place, picture in enumerate(tiny.synthetic_clip(count, size=size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = 500 * place if milliseconds is None else milliseconds[place]
            frame.time_base = Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path
