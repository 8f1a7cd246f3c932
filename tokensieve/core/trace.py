"""Records of what a run did: per visual item, per stage, in plain tensors on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.plan import MergeMap


@dataclass
class ItemTrace:
    """One visual item of one prompt row.

    Attributes
    ----------
    row, index
        Prompt row, and which visual item of the row.
    layout : Layout
        Geometry of the uncompressed item.
    keep : Tensor [M]
        Patches that entered the LLM, in reading order.
    merged : MergeMap, optional
        What was folded into them.
    separators
        Separators that entered.
    info
        Quantities that the method reported.
    decoder : dict
        Decoder layer -> patches that went on into it.
    """

    row: int
    index: int
    layout: Layout
    keep: Tensor
    separators: int
    merged: MergeMap | None = None
    info: dict[str, Any] = field(default_factory=dict)
    decoder: dict[int, Tensor] = field(default_factory=dict)

    def cells(self) -> Tensor:
        """Source (frame, row, column) of every token that entered, int64 [M, 3]."""
        tokens = self.layout.patch_tokens[self.keep]
        return torch.stack((self.layout.view[tokens], self.layout.row[tokens], self.layout.column[tokens]), 1)

    def per_frame(self) -> Tensor:
        """Number of patches of every frame that entered, int64 [views]."""
        return torch.bincount(self.layout.patch_view[self.keep], minlength=len(self.layout.views))


@dataclass
class PrefillTrace:
    """One prefill with visual tokens.

    Attributes
    ----------
    items
        Visual items in prompt order.
    before, after
        Real tokens of every row in front of the LLM, before and after compression (text included).
    inside
        Decoder layer -> tokens of every row from that layer on, where a method cut inside the LLM (text, separators
        and tokens that are only hidden included).
    """

    items: list[ItemTrace] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    inside: dict[int, list[int]] = field(default_factory=dict)


class Clock:
    """Adds up the time of named stages; CUDA work is timed with events and read out only on demand."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._events: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        self.start(stage)
        try:
            yield
        finally:
            self.stop(stage)

    def start(self, stage: str) -> None:
        """Begin a stage."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._open[stage] = event
        else:
            self._open[stage] = time.perf_counter()

    def stop(self, stage: str) -> None:
        """End a stage; one that was never begun is ignored."""
        begun = self._open.pop(stage, None)
        if begun is None:
            return
        self._calls[stage] = self._calls.get(stage, 0) + 1
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((stage, begun, event))
            if len(self._events) > 512:
                self._read_events()
        else:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - begun

    def _read_events(self) -> None:
        if self._events:
            torch.cuda.synchronize()
        for stage, begun, ended in self._events:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + begun.elapsed_time(ended) / 1e3
        self._events = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far."""
        self._read_events()
        return dict(self._seconds)

    @property
    def calls(self) -> dict[str, int]:
        """How often each stage ran."""
        return dict(self._calls)
