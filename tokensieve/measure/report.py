"""The report of a run: tokens asked for and achieved, time, arithmetic, cache and memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from tokensieve.measure.text import summary

__all__ = ["Change", "ItemReport", "Report", "Requested", "TokenCounts"]


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens there are at the places where papers measure retention.

    Attributes
    ----------
    uncompressed
        Without any method.
    entered
        In front of the first decoder layer.
    average
        Per decoder layer, averaged over all layers.
    last
        Behind the last cut.
    """

    uncompressed: int
    entered: int
    average: float
    last: int

    def share(self, which: str = "entered") -> float:
        """``entered``, ``average`` or ``last`` as a share of the uncompressed number (1 where there is none)."""
        return float(getattr(self, which)) / self.uncompressed if self.uncompressed else 1.0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.uncompressed + other.uncompressed,
            self.entered + other.entered,
            self.average + other.average,
            self.last + other.last,
        )

    def to_dict(self) -> dict[str, float]:
        """Counts and shares."""
        shares = {f"{which}_share": self.share(which) for which in ("entered", "average", "last")}
        return {**asdict(self), **shares}


@dataclass(frozen=True)
class Change:
    """A quantity without and with compression."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After as a share of before (1 where there was nothing)."""
        return self.after / self.before if self.before else 1.0

    def to_dict(self) -> dict[str, float]:
        """Both and their ratio."""
        return {"before": self.before, "after": self.after, "ratio": self.ratio}


@dataclass(frozen=True)
class Requested:
    """What one method was asked for.

    Attributes
    ----------
    method
        Name of the method.
    retention
        Its ``retention`` option, a share of patches to keep.
    counted
        Which patches that share counts.
    dropped
        One minus the retention for methods that only cut inside the LLM, whose papers state the share dropped
        (FastV's R); None for the others.
    options
        All options.
    """

    method: str
    retention: float
    counted: str
    dropped: float | None
    options: dict[str, Any]


@dataclass(frozen=True)
class ItemReport:
    """One video or image of one prompt row.

    Attributes
    ----------
    prefill, row, index
        Which prefill of the run, which row of it, and which visual item of the row.
    kind
        ``"video"`` or ``"image"``.
    patches
        Patches, separators left out.
    separators_before, separators
        Newline embeddings of the uncompressed item, and those that entered.
    frame_patches, frame_kept
        Patches of every view (frame, temporal step, or tile mosaic) without compression, and those that
        entered.
    cells : Tensor [M, 3]
        Source (frame, row, column) of every patch that entered, in reading order.
    """

    prefill: int
    row: int
    index: int
    kind: str
    patches: TokenCounts
    separators_before: int
    separators: int
    frame_patches: list[int]
    frame_kept: list[int]
    cells: Tensor

    @property
    def frames_kept(self) -> int:
        """Views of which at least one patch entered."""
        return sum(count > 0 for count in self.frame_kept)

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """As plain data; ``full`` adds the kept map as lists of [frame, row, column]."""
        found = {
            "prefill": self.prefill,
            "row": self.row,
            "index": self.index,
            "kind": self.kind,
            "patches": self.patches.to_dict(),
            "separators": {"before": self.separators_before, "entered": self.separators},
            "frames": {"total": len(self.frame_patches), "kept": self.frames_kept},
            "frame_patches": self.frame_patches,
            "frame_kept": self.frame_kept,
        }
        return {**found, "kept": self.cells.tolist()} if full else found


@dataclass(frozen=True)
class Report:
    """Summary of a run; sums over the prefills with visual tokens that it remembers (the last 64).

    ``print(report)`` gives a few readable lines, `to_dict` everything as plain data.

    Attributes
    ----------
    host
        Family of the model.
    requested
        What each method was asked for.
    prefills
        Number of prefills that the sums cover; 0 when nothing was compressed yet.
    items
        Every video and image.
    patches, sequence
        Visual patches alone, and all tokens of the prompts: patches, separators and text.
    separators
        Newline embeddings, which no method scores.
    text
        Text tokens; never changed.
    layers
        Number of decoder layers.
    seconds, calls
        Time and number of calls per stage since the run began or was reset: ``encode`` (tower, projector and
        the reading of tower signals), ``compress`` (the methods, in front of and inside the LLM), ``prefill``
        (without ``compress``), ``decode``.
    encoder
        Operations of tower and projector; None for a tower whose arithmetic is not known.
    prefill
        Operations of the LLM's prefill, each row alone and without padding, the head for one position a row;
        None for mixtures of experts. Attention to the cache of earlier turns is not counted.
    convention
        The same by the formula of the papers, ``4 n d^2 + 2 n^2 d + 2 n d m`` with n patches.
    cache
        Bytes of the key / value cache behind the prefills, in the model's dtype.
    cache_token_bytes
        Bytes that one token takes in the cache over all layers.
    peak_memory, memory_kind
        Most memory in use, in bytes, and what was counted.
    """

    host: str
    requested: list[Requested]
    prefills: int
    layers: int
    patches: TokenCounts
    sequence: TokenCounts
    separators: Change
    text: int
    seconds: dict[str, float]
    calls: dict[str, int]
    encoder: Change | None
    prefill: Change | None
    convention: Change | None
    cache: Change | None
    cache_token_bytes: int | None
    peak_memory: int
    memory_kind: str
    items: list[ItemReport] = field(default_factory=list)

    @property
    def frame_counts(self) -> list[list[int]]:
        """Patches that entered, per frame, of every item."""
        return [item.frame_kept for item in self.items]

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """As plain data for JSON.

        Parameters
        ----------
        full : bool
            Also list (frame, row, column) of every patch that entered.
        """
        changes = ("separators", "encoder", "prefill", "convention", "cache")
        found = {name: getattr(self, name) for name in changes}
        return {
            "host": self.host,
            "requested": [asdict(one) for one in self.requested],
            "prefills": self.prefills,
            "layers": self.layers,
            "patches": self.patches.to_dict(),
            "sequence": self.sequence.to_dict(),
            "text": self.text,
            **{name: None if change is None else change.to_dict() for name, change in found.items()},
            "cache_token_bytes": self.cache_token_bytes,
            "seconds": self.seconds,
            "calls": self.calls,
            "peak_memory": self.peak_memory,
            "memory_kind": self.memory_kind,
            "items": [item.to_dict(full) for item in self.items],
        }

    def __str__(self) -> str:
        return summary(self)
