"""Where a video comes from: a path, a URL, bytes or a file object, opened under limits."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tokensieve.errors import VideoError
from tokensieve.video.download import FetchLimits, download, public_label

Source = str | Path | bytes | bytearray | memoryview | IO[bytes]

_END_BYTES = 64
_COPY_BYTES = 1 << 20
# Two letters at least, so that a Windows drive is not taken for a scheme.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_KINDS = "give a path, an http(s) URL, bytes or a file opened in binary mode"


@dataclass(frozen=True)
class OpenSource:
    """An input that can be read, and read again, from its beginning.

    Attributes
    ----------
    label : str
        Name for messages.
    target : str or binary file object
        Absolute path of a file, or a seekable object.
    size : int
        Bytes.
    head, tail : bytes
        First and last 64 bytes.
    """

    label: str
    target: str | IO[bytes]
    size: int
    head: bytes
    tail: bytes

    def rewound(self) -> str | IO[bytes]:
        """Return ``target`` with a file object set back to its beginning."""
        if not isinstance(self.target, str):
            self.target.seek(0)
        return self.target


@contextmanager
def open_source(source: Source, limits: FetchLimits | None = None) -> Iterator[OpenSource]:
    """Open a path, http(s) URL, bytes or binary file object; temporary copies are removed on exit.

    Parameters
    ----------
    source : str, Path, bytes or binary file object
        File objects are read from their beginning and left open. Those that cannot seek are copied to a
        temporary file first.
    limits : FetchLimits, optional
        Bounds for URLs; ``max_bytes`` also bounds file objects that must be copied.

    Yields
    ------
    OpenSource

    Raises
    ------
    VideoError
        If there is nothing to read, or a limit is exceeded.
    """
    limits = limits or FetchLimits()
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        yield _measured(f"<{len(data)} bytes>", io.BytesIO(data))
    elif isinstance(source, str) and (scheme := _SCHEME.match(source)):
        label = public_label(source)
        if scheme[1].lower() not in ("http", "https"):
            raise VideoError(f"the scheme of {label} is not supported; {_KINDS}.")
        with tempfile.TemporaryDirectory(prefix="tokensieve-") as folder:
            path = Path(folder, "video")
            with path.open("wb") as target:
                download(source, target, limits)
            yield _from_path(path, label)
    elif isinstance(source, str | Path):
        if not str(source):
            raise VideoError(f"the path of the video is empty; {_KINDS}.")
        yield _from_path(Path(source), str(source))
    elif callable(getattr(source, "read", None)):
        with _from_file(source, limits) as opened:
            yield opened
    else:
        raise VideoError(f"a video cannot be read from a {type(source).__name__}; {_KINDS}.")


def _from_path(path: Path, label: str) -> OpenSource:
    try:
        path = path.expanduser().resolve()
        if not path.exists():
            raise VideoError(f"{label} does not exist; check the path.")
        if path.is_dir():
            raise VideoError(f"{label} is a folder; give one video file in it.")
        if not path.is_file():
            raise VideoError(f"{label} is not a regular file; copy the video into a file first.")
        with path.open("rb") as file:
            return _measured(label, file, str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise VideoError(f"{label!r} cannot be opened ({_reason(error)}); check the path.") from error


@contextmanager
def _from_file(file: Any, limits: FetchLimits) -> Iterator[OpenSource]:
    label = " ".join(filter(None, (type(file).__name__, str(getattr(file, "name", "")))))
    label = f"<{label}>"
    with ExitStack() as stack:
        try:
            if not (hasattr(file, "seekable") and file.seekable()):
                copy = stack.enter_context(tempfile.TemporaryFile(prefix="tokensieve-"))
                file = _spooled(label, file, copy, limits)
            opened = _measured(label, file)
        except (OSError, ValueError, TypeError) as error:
            raise VideoError(f"{label} cannot be read ({_reason(error)}); {_KINDS}.") from error
        yield opened


def _measured(label: str, file: IO[bytes], path: str | None = None) -> OpenSource:
    """Look at both ends of a seekable file; the result refers to the path if one is given."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _END_BYTES, 0))
    tail = file.read(_END_BYTES)
    file.seek(0)
    head = file.read(_END_BYTES)
    if not isinstance(head, bytes):
        raise VideoError(f"{label} gives text, not bytes; open it in binary mode ('rb').")
    if not head:
        raise VideoError(f"{label} is empty (0 bytes); check that it was written completely.")
    return OpenSource(label, path or file, size, head, tail)


def _spooled(label: str, file: Any, copy: IO[bytes], limits: FetchLimits) -> IO[bytes]:
    """Copy a stream that cannot seek, at most ``max_bytes`` of it."""
    size = 0
    while chunk := file.read(_COPY_BYTES):
        if not isinstance(chunk, bytes):
            raise VideoError(f"{label} gives text, not bytes; open it in binary mode ('rb').")
        size += len(chunk)
        if size > limits.max_bytes:
            raise VideoError(f"{label} is larger than max_bytes={limits.max_bytes}; raise it to read on.")
        copy.write(chunk)
    return copy


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
