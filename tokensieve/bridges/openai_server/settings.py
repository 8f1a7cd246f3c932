"""What whoever starts a server decides; requests move inside of these limits."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path

from tokensieve.bridges.generation import check_retention_option
from tokensieve.core.method import Method, check_retention
from tokensieve.core.registry import list_methods, resolve
from tokensieve.errors import MethodError, RetentionError, TokensieveError, VideoError

__all__ = ["MediaLimits", "ServerSettings"]


@dataclass(frozen=True)
class MediaLimits:
    """Bounds on the clips that requests may name.

    Attributes
    ----------
    max_bytes : int
        Largest file, download or decoded ``data:`` address.
    max_seconds : float
        Longest video.
    max_pixels : int
        Largest picture as stored, width times height.
    max_memory : int
        Bytes that the frames of one clip may take; larger frames are scaled down while they are decoded.
    max_clips : int
        Most videos and images in one request.
    max_redirects : int
        Most redirects of a download.
    timeout : float
        Seconds to wait for another server at each step.
    max_fetch_seconds : float
        Longest download as a whole.
    allow_http : bool
        Whether ``http:`` is accepted besides ``https:``.
    allow_private : bool
        Whether addresses that are not public may be fetched from.
    root : Path, optional
        Folder whose files ``file:`` addresses may name; None refuses them.
    """

    max_bytes: int = 256 << 20
    max_seconds: float = 3600.0
    max_pixels: int = 1 << 25
    max_memory: int = 1 << 29
    max_clips: int = 8
    max_redirects: int = 5
    timeout: float = 20.0
    max_fetch_seconds: float = 120.0
    allow_http: bool = False
    allow_private: bool = False
    root: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_seconds", "max_pixels", "max_memory", "max_clips", "timeout"):
            if not getattr(self, name) > 0:
                raise VideoError(f"{name} must be above 0, not {getattr(self, name)!r}.")
        if self.root is not None:
            if not self.root.is_dir():
                raise VideoError(f"The media root {self.root} is no folder; name an existing one.")
            object.__setattr__(self, "root", self.root.resolve())


@dataclass(frozen=True)
class ServerSettings:
    """Limits and defaults of a server.

    Attributes
    ----------
    model_name : str
        The ``model`` that requests name.
    method : str
        Method of requests that name none, in the one-line notation.
    retention : float
        Retention of requests that name none.
    allowed_methods : tuple of str
        Notations, or wildcards over names, that requests may choose besides ``method``.
    min_retention, max_retention : float
        What requests may choose; at most ``retention`` unless given, so that no request costs more than planned.
    frames, max_frames : int
        Frames taken of a clip, and most that a request may ask for.
    new_tokens, max_new_tokens : int
        Longest answer by default, and at most.
    max_prompt_tokens : int, optional
        Longest prompt before compression; the backend's own limit unless given.
    queue : int
        Requests that may wait; one more is refused with status 429.
    ahead : int, optional
        Of these, how many are decoded before their turn comes; as many as the backend answers at a time, and two at
        least, unless given.
    decoders : int
        Threads that read clips.
    api_key : str, optional
        What clients must send as a bearer token.
    max_body : int
        Largest request body, bytes.
    max_text : int
        Most characters of text in a request; a tokenizer can take seconds for more.
    body_timeout : float
        Seconds within which a body must arrive.
    media : MediaLimits
        Bounds on clips.
    """

    model_name: str
    method: str = "vidcom2"
    retention: float = 0.25
    allowed_methods: tuple[str, ...] = ()
    min_retention: float = 0.01
    max_retention: float | None = None
    frames: int = 32
    max_frames: int = 128
    new_tokens: int = 256
    max_new_tokens: int = 2048
    max_prompt_tokens: int | None = None
    queue: int = 64
    ahead: int | None = None
    decoders: int = 2
    api_key: str | None = None
    max_body: int = 64 << 20
    max_text: int = 1 << 18
    body_timeout: float = 60.0
    media: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self) -> None:
        check_retention(self.retention)
        check_retention(self.min_retention)
        check_retention(self.highest_retention)
        if not self.min_retention <= self.retention <= self.highest_retention:
            raise RetentionError(
                f"The retention {self.retention:g} lies outside of {self.min_retention:g} to "
                f"{self.highest_retention:g}; widen the limits."
            )
        for name in ("frames", "max_frames", "new_tokens", "max_new_tokens", "decoders", "max_body"):
            if getattr(self, name) < 1:
                raise TokensieveError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.queue < 0 or (self.ahead or 0) < 0:
            raise TokensieveError(f"queue and ahead must be 0 or more, not {self.queue} and {self.ahead}.")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise TokensieveError("The API key is empty or not ASCII; choose another, or none for open access.")
        object.__setattr__(self, "frames", min(self.frames, self.max_frames))
        object.__setattr__(self, "new_tokens", min(self.new_tokens, self.max_new_tokens))
        for spec in self.methods:
            check_retention_option(spec, resolve(spec))

    @property
    def highest_retention(self) -> float:
        """Most that a request may keep."""
        return self.retention if self.max_retention is None else self.max_retention

    def decoded_ahead(self, parallel: int) -> int:
        """Waiting requests that are decoded already, for a backend that answers so many at a time."""
        return min(self.queue, max(2, parallel) if self.ahead is None else self.ahead)

    @property
    def methods(self) -> tuple[str, ...]:
        """All notations that a request may name, the default first."""
        found = [self.method]
        for entry in self.allowed_methods:
            found += fnmatch.filter(list_methods(), entry) if set("*?[") & set(entry) else [entry]
        return tuple(dict.fromkeys(found))

    def choose(self, method: str | None, retention: float | None) -> tuple[str, float, list[Method]]:
        """What a request gets.

        Parameters
        ----------
        method, retention
            What it asked for; None for the server's choice.

        Returns
        -------
        tuple of str, float, list of Method
            Notation, retention and method objects.

        Raises
        ------
        MethodError
            For a choice outside of the limits.
        """
        name = self.method if method is None else method
        if name not in self.methods:
            raise MethodError(f"The method {name!r} is not offered here; use one of {', '.join(self.methods)}.")
        share = self.retention if retention is None else check_retention(retention)
        if not self.min_retention <= share <= self.highest_retention:
            raise RetentionError(
                f"A retention of {share:g} is not offered here; use {self.min_retention:g} to "
                f"{self.highest_retention:g}."
            )
        return name, share, resolve(name, retention=share)
