"""What is remembered of one call of the vision encoder until the LLM consumes its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokensieve.core.layout import ItemKind, Layout


@dataclass
class EncodedItem:
    """One visual item of an encoder call.

    Attributes
    ----------
    layout : Layout
        Its tokens as the LLM will see them.
    units : slice
        Which rows of a raw tower signal belong to it: pictures for towers that take a batch of pictures,
        patches for towers that take one packed sequence.
    frames_kept : Tensor, optional
        Views that a frames-stage method keeps.
    fewer : tuple, optional
        The call that encoded only those views, and this item in it.
    whole : EncodedItem, optional
        The item as the encoder gave it, when the host itself passes only some of its tokens on.
    present : Tensor, optional
        Those tokens, as ids of ``whole.layout``.
    """

    layout: Layout
    units: slice
    frames_kept: Tensor | None = None
    fewer: tuple[EncodeCall, EncodedItem] | None = None
    whole: EncodedItem | None = None
    present: Tensor | None = None


@dataclass
class EncodeCall:
    """One call of ``get_image_features`` or ``get_video_features``.

    Attributes
    ----------
    arguments
        Bound arguments of the call (pixel values, grids, image sizes).
    items
        The visual items in the order of the call.
    raw
        Tower signals by request text, in the tower's own units.
    tower_tokens : Tensor [pictures, layers, 2], optional
        Tokens that attention and feed-forward part of every tower block saw, where a method shortened the
        sequence inside the tower.
    """

    modality: ItemKind
    arguments: Mapping[str, Any]
    items: list[EncodedItem] = field(default_factory=list)
    raw: dict[str, Tensor] = field(default_factory=dict)
    tower_tokens: Tensor | None = None

    @property
    def pixel_key(self) -> str:
        """Name of the argument that holds the pixels; transformers 5.17 calls it alike for both modalities."""
        names = ("pixel_values_videos", "pixel_values") if self.modality == "video" else ("pixel_values",)
        return next(name for name in names if name in self.arguments)

    def forget_pixels(self) -> None:
        """Let go of the pixels once they are encoded; features may live long, pixels need not."""
        key = self.pixel_key
        self.arguments = {name: value for name, value in self.arguments.items() if name != key}
        for item in self.items:
            if item.fewer is not None and item.fewer[0] is not self and key in item.fewer[0].arguments:
                item.fewer[0].forget_pixels()
