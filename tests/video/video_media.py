"""Where the real clips are, and small video files made on the fly."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TOKENSIEVE_DATA_DIR") or REPOSITORY.parent / "shared" / "data")
MANIFEST = DATA / "videos" / "MANIFEST.json"
CLIPS: dict[str, dict[str, Any]] = (
    {entry["file"]: entry for entry in json.loads(MANIFEST.read_text())} if MANIFEST.is_file() else {}
)


@dataclass
class Reference:
    """All presentation times of a clip in seconds, and pictures of evenly spread frames."""

    times: NDArray[np.float64]
    places: NDArray[np.int64]
    pictures: list[NDArray[np.uint8]]


def picture(place: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """An RGB picture [H, W, 3] whose brightness tells its place (0 to 49), with some texture."""
    rows, columns = np.mgrid[0:height, 0:width]
    texture = (rows * 7 + columns * 3 + place * 5) % 16
    return np.repeat((place * 5 + texture)[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)


def place_of(frame: NDArray[np.uint8]) -> int:
    """Recover the place from a decoded picture."""
    rows, columns = frame.shape[:2]
    errors = [np.abs(picture(place, columns, rows).astype(int) - frame.astype(int)).mean() for place in range(50)]
    return int(np.argmin(errors))


def encode(
    pictures: Iterable[NDArray[np.uint8]],
    *,
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int | Fraction = 10,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    audio: bool = False,
) -> bytes:
    """Encode pictures to the bytes of a file; ``ticks`` are their presentation times in ``time_base``."""
    pictures = list(pictures)
    with tempfile.NamedTemporaryFile() as file:
        _write(
            file.name, pictures, container, codec, pix_fmt, rate, ticks, time_base, options, container_options, audio
        )
        return Path(file.name).read_bytes()


def _write(
    path: str,
    pictures: list[NDArray[np.uint8]],
    container: str,
    codec: str,
    pix_fmt: str,
    rate: int | Fraction,
    ticks: Sequence[int] | None,
    time_base: Fraction | None,
    options: dict[str, str] | None,
    container_options: dict[str, str] | None,
    audio: bool,
) -> None:
    height, width = pictures[0].shape[:2]
    with av.open(path, "w", format=container, container_options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        base = time_base or 1 / Fraction(rate)
        stream.time_base = base
        stream.codec_context.time_base = base
        if audio:
            add_sound(output, 0)
        for place, pixels in enumerate(pictures):
            kind = "rgba" if pixels.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(pixels, format=kind).reformat(format=pix_fmt)
            frame.pts = place if ticks is None else ticks[place]
            frame.time_base = base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def sequence(count: int, width: int = 64, height: int = 48) -> list[NDArray[np.uint8]]:
    """The first ``count`` pictures."""
    return [picture(place, width, height) for place in range(count)]


def add_sound(output: Any, seconds: float) -> None:
    """Add a stream of silence to an open container."""
    stream = output.add_stream("aac", rate=8000)
    stream.layout = "mono"
    for block in range(max(int(seconds * 8000 / 1024), 1)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, block * 1024, Fraction(1, 8000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def sound_only() -> bytes:
    """An MP4 file without a video stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        add_sound(output, 1.0)
    return buffer.getvalue()


def with_display_matrix(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Write (a, b, c, d) of the display matrix into the first track header of an MP4 file."""
    start = mp4.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    numbers = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    packed = b"".join((number & 0xFFFFFFFF).to_bytes(4, "big") for number in numbers)
    return mp4[:start] + packed + mp4[start + 36 :]


def decode_all(data: bytes) -> tuple[list[int | None], list[NDArray[np.uint8]]]:
    """Time stamps and RGB pictures of all frames, from a plain PyAV loop."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
        return [frame.pts for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]
