"""Places inside the LLM at which a method may shorten the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Point = Literal["layer", "feed"]
"""In front of a decoder layer, or inside of it between attention and feed-forward part."""


@dataclass(frozen=True)
class Cut:
    """One place at which a method with a decoder stage is asked for a plan.

    Attributes
    ----------
    layer
        Decoder layer, from zero.
    point
        ``"layer"`` is in front of that layer. ``"feed"`` is between its attention (residual added) and its
        feed-forward part, so that the layer's cache still holds what is dropped here.
    restore
        Tokens that an earlier plan of the method put aside come back in front of this layer, before the method plans.
    """

    layer: int
    point: Point = "layer"
    restore: bool = False

    @property
    def first(self) -> int:
        """First layer whose attention runs on what is kept."""
        return self.layer + (self.point == "feed")

    @property
    def attention(self) -> int:
        """Last layer whose attention has run; -1 in front of the first layer."""
        return self.first - 1

    def __str__(self) -> str:
        where = "in front of" if self.point == "layer" else "behind the attention of"
        return f"{where} layer {self.layer}"
