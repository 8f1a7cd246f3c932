"""What decides an answer, and so whether an answer of an earlier run still counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BatchSettings"]


@dataclass(frozen=True)
class BatchSettings:
    """How every clip is answered.

    Attributes
    ----------
    model : str
        Folder or hub name, readable by all workers.
    method : str
        Notation of the methods.
    retention : float
        Share of the visual tokens to keep.
    frames : int
        Frames per clip.
    fps : float, optional
        Frames per second instead, at most ``frames``.
    max_pixels : int, optional
        Scale frames down to so many pixels while decoding.
    max_new_tokens : int
        Longest answer.
    dtype, attn : str
        Type of the weights, and attention kernel.
    """

    model: str
    method: str = "vidcom2"
    retention: float = 0.25
    frames: int = 32
    fps: float | None = None
    max_pixels: int | None = None
    max_new_tokens: int = 64
    dtype: str = "auto"
    attn: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return asdict(self)
