"""Clips named by a request: fetched, decoded and bounded, without leaving a file behind."""

from __future__ import annotations

import base64
import binascii
import io
import logging
import os
import re
import tempfile
import threading
import time
import urllib.parse
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Literal, cast

from tokensieve.bridges.openai_server.settings import MediaLimits
from tokensieve.errors import VideoError
from tokensieve.video import Clip, FetchLimits, probe, read_clip
from tokensieve.video.download import download, public_label

__all__ = ["Cancelled", "read_media"]

logger = logging.getLogger("tokensieve")

Kind = Literal["video", "image"]

_DATA = re.compile(r"data:(?P<type>[^,;]*)(?P<parameters>(;[^,;]*)*),", re.IGNORECASE)
_LONGEST_HEADER = 256


class Cancelled(Exception):
    """Nobody waits for the clip any more."""


class _Guarded:
    """A file that stops a download when nobody waits for it, or when it takes too long as a whole."""

    def __init__(self, file: IO[bytes], cancelled: threading.Event, seconds: float, label: str) -> None:
        self._file, self._cancelled, self._label = file, cancelled, label
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def write(self, chunk: bytes) -> int:
        """Pass a chunk on."""
        if self._cancelled.is_set():
            raise Cancelled
        if time.monotonic() > self._end:
            raise VideoError(f"{self._label} took longer than {self._seconds:g} s; send the file itself as data.")
        return self._file.write(chunk)


def read_media(
    url: str, kind: Kind, limits: MediaLimits, frames: int, fps: float | None, cancelled: threading.Event
) -> Clip:
    """Read the clip that an address stands for.

    Downloads go to a file without a name, which the system removes however the process ends.

    Parameters
    ----------
    url : str
        ``https:``, ``data:`` with base64, or ``file:`` under the allowed root.
    kind : {"video", "image"}
        What the request says it is; a still image is accepted as a video, not the reverse.
    limits : MediaLimits
        Bounds.
    frames : int
        Frames to take, spread evenly, or the most to take with ``fps``.
    fps : float, optional
        Frames per second to take.
    cancelled : threading.Event
        Set when the client has gone; decoding ends at the next frame.

    Returns
    -------
    Clip

    Raises
    ------
    VideoError
        In one sentence, if the address is refused, a bound is exceeded or the clip is broken.
    Cancelled
        If nobody waits any more.
    """
    with ExitStack() as stack:
        label, file = _open(url, limits, stack, cancelled)
        own = f"<{type(file).__name__} {file.name}>" if hasattr(file, "name") else f"<{type(file).__name__}>"
        if cancelled.is_set():
            raise Cancelled
        try:
            clip = _read(file, label, kind, limits, frames, fps, cancelled)
        except VideoError as error:
            raise VideoError(str(error).replace(own, label)) from error
        except (Cancelled, MemoryError):
            raise
        except Exception as error:
            logger.exception("reading %s failed", label)
            raise VideoError(
                f"{label} cannot be read ({type(error).__name__}); check that a player shows it."
            ) from error
    return replace(clip, info=replace(clip.info, label=label))


def _read(
    file: IO[bytes],
    label: str,
    kind: Kind,
    limits: MediaLimits,
    frames: int,
    fps: float | None,
    cancelled: threading.Event,
) -> Clip:
    info = probe(file)
    if kind == "image" and not info.is_image:
        raise VideoError(f"{label} is a video; send it as video_url.")
    if info.duration > limits.max_seconds:
        raise VideoError(
            f"{label} lasts {info.duration:.0f} s, longer than the {limits.max_seconds:g} s allowed here; cut it."
        )
    if info.width * info.height > limits.max_pixels:
        raise VideoError(
            f"{label} has {info.width}x{info.height} pixels, more than the {limits.max_pixels} allowed here; "
            "scale it down."
        )

    def progress(done: int, total: int | None) -> None:
        if cancelled.is_set():
            raise Cancelled

    return read_clip(
        file,
        frames,
        "uniform" if fps is None else "fps",
        fps=fps,
        max_frames=frames,
        max_pixels=max(1, limits.max_memory // (3 * frames)),
        progress=progress,
        max_memory=limits.max_memory,
    )


def _open(url: str, limits: MediaLimits, stack: ExitStack, cancelled: threading.Event) -> tuple[str, IO[bytes]]:
    """A name for messages and a file to read from."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _open_data(url, limits)
    if scheme == "file":
        return _open_file(url, limits, stack)
    if scheme == "https" or (scheme == "http" and limits.allow_http):
        fetch = FetchLimits(limits.max_bytes, limits.timeout, limits.max_redirects, limits.allow_private)
        file = stack.enter_context(_nameless())
        guarded = _Guarded(file, cancelled, limits.max_fetch_seconds, public_label(url))
        try:
            download(url, cast(IO[bytes], guarded), fetch)
        except VideoError as error:
            # The option names of the library mean nothing to a client.
            raise VideoError(_for_clients(str(error), public_label(url))) from error
        file.flush()
        return public_label(url), file
    refused = public_label(url) if "://" in url[:32] else repr(url[:32])
    offered = [
        "https",
        "data",
        *(["file"] if limits.root is not None else []),
        *(["http"] if limits.allow_http else []),
    ]
    raise VideoError(f"The address {refused} is not accepted here; use one that begins with {', '.join(offered)}.")


def _nameless() -> IO[bytes]:
    """A temporary file that no folder lists."""
    return tempfile.TemporaryFile(prefix="tokensieve-")


def _for_clients(message: str, label: str) -> str:
    if "which is not a public address" in message:
        return message.partition("; ")[0] + "; this server fetches from public addresses only."
    if "max_bytes" in message:
        return f"{label} is larger than this server accepts; send a smaller file."
    return message


def _open_data(url: str, limits: MediaLimits) -> tuple[str, IO[bytes]]:
    match = _DATA.match(url[:_LONGEST_HEADER])
    if match is None or not match["parameters"].lower().endswith(";base64"):
        raise VideoError("The data: address is not in base64; write data:video/mp4;base64, and the encoded file.")
    body = memoryview(url.encode("ascii", "replace"))[match.end() :]
    if len(body) // 4 * 3 > limits.max_bytes + 2:
        raise VideoError(f"The data: address holds more than the {limits.max_bytes} bytes allowed here; send less.")
    try:
        data = base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise VideoError(f"The data: address is no valid base64 ({error}); encode the file again.") from error
    return f"the data: address ({len(data)} bytes)", io.BytesIO(data)


def _open_file(url: str, limits: MediaLimits, stack: ExitStack) -> tuple[str, IO[bytes]]:
    if limits.root is None:
        raise VideoError("file: addresses are not accepted here; send the video as a data: or https: address.")
    parts = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(parts.path)
    # One sentence for all that cannot be had, so that it does not tell what lies outside of the root.
    missing = VideoError("The file: address names no file under this server's media folder; check the path.")
    if parts.netloc not in ("", "localhost") or "\0" in name or not name.startswith("/"):
        raise missing
    try:
        path = Path(name).resolve(strict=True)
        if not path.is_relative_to(limits.root) or not path.is_file():
            raise missing
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, RuntimeError, ValueError) as error:
        raise missing from error
    file = stack.enter_context(os.fdopen(handle, "rb"))
    label = path.relative_to(limits.root).as_posix()
    size = os.fstat(file.fileno()).st_size
    if size > limits.max_bytes:
        raise VideoError(
            f"{label} has {size} bytes, more than the {limits.max_bytes} allowed here; send a smaller one."
        )
    return label, file
