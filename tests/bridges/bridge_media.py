"""Small videos, and requests that show them."""

from __future__ import annotations

import base64
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from tokensieve.hosts import tiny


def write_video(path: Path, count: int = 8, size: tuple[int, int] = (64, 96), seed: int = 0) -> Path:
    """Encode moving shapes at two frames per second."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=2)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for place, picture in enumerate(tiny.synthetic_clip(count, seed=seed, size=size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = 500 * place, Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def data_url(path: Path, kind: str = "video/mp4") -> str:
    """A file as an address."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(*parts: dict[str, Any], question: str = "What moves?", **fields: Any) -> dict[str, Any]:
    """A request of one user message."""
    message = {"role": "user", "content": [*parts, text_part(question)]}
    return {"messages": [message], "max_tokens": 6, **fields}
