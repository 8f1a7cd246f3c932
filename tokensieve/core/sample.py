"""What a method sees: one visual item (or one prompt row) with local indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.cuts import Cut
from tokensieve.core.layout import Layout, Separators
from tokensieve.core.signals import unit_of
from tokensieve.errors import MethodError


@dataclass(frozen=True)
class HostFacts:
    """The few numbers about a host that a method may choose defaults by.

    Attributes
    ----------
    family
        Slug of the host.
    decoder_layers, tower_layers
        Number of LLM layers and of vision tower layers.
    feature_layer
        Index (from zero) of the tower layer whose output is projected.
    has_class_token
        Whether the tower carries a class token.
    position_axes
        1 for plain rotary positions, 3 for temporal / height / width.
    deepstack_layers
        Number of first decoder layers that receive extra visual features; no cut may happen inside.
    window_attention
        Whether some tower layers attend inside windows only.
    patch_tokens
        Whether every patch of the tower becomes one token of the LLM, without pooling.
    tiled_images
        Whether an image may be several pictures (a base picture and tiles).
    drops_packed
        Whether patches can be dropped inside a tower that takes all pictures as one sequence.
    tower_pair
        Kind of the contrastive pair that the vision tower is half of (``"clip"``, ``"siglip"``), empty for others.
    text_tower
        Where its other half is known to be, if it is (see `tokensieve.pairing`).
    video_separators
        Separators of a video: ``"none"``, ``"row"`` behind every grid row, or ``"end"`` behind the video.
    """

    family: str
    decoder_layers: int
    tower_layers: int
    feature_layer: int
    has_class_token: bool
    position_axes: int = 1
    deepstack_layers: int = 0
    window_attention: bool = False
    patch_tokens: bool = False
    tiled_images: bool = False
    drops_packed: bool = False
    tower_pair: str = ""
    text_tower: str | None = None
    video_separators: Separators = "none"


@dataclass
class FrameSample:
    """One video before it is encoded: the number of its frames (temporal steps of the tower)."""

    frames: int
    index: int = 0


@dataclass
class TokenSample:
    """One visual item in front of the LLM.

    Attributes
    ----------
    features : Tensor [n, D]
        Patch features (separators left out), frame-major and row-major, in the model's dtype.
    layout : Layout
        Geometry; ``layout.patches == n``.
    signals
        Requested signals, by the text of the request.
    facts : HostFacts, optional
        About the host; None when a method is called outside a model.
    budget : Tensor [views], optional
        Number of tokens each view may keep, when a frame-budget module allocates.
    index
        Which visual item of the prompt row this is.
    text, text_before : Tensor [T, D], optional
        Input embeddings of the text between this visual item and the next one (or the end of the prompt), and between
        the item before (or the beginning) and this one.
    project
        The host's projector, from tower states [m, C] to tokens [m, D], where it takes patch by patch.
    """

    features: Tensor
    layout: Layout
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    facts: HostFacts | None = None
    budget: Tensor | None = None
    index: int = 0
    generator: torch.Generator | None = None
    text: Tensor | None = None
    text_before: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    @property
    def frames(self) -> int:
        """Number of views."""
        return len(self.layout.views)

    @property
    def by_frame(self) -> Tensor:
        """Features as [F, N, D]; needs equal views."""
        if not self.layout.is_uniform:
            raise MethodError(f"This item has views of different sizes {self.layout.views}; plan view by view.")
        return self.features.view(self.frames, -1, self.features.shape[-1])

    def signal(self, request: str) -> Tensor:
        """A requested signal, or a MethodError that names it."""
        if request not in self.signals:
            raise MethodError(f"The signal {request!r} was not requested or not provided.")
        return self.signals[request]

    def view(self, index: int) -> TokenSample:
        """One view as a sample of its own."""
        layout = self.layout.of_view(index)
        start = int(self.layout.patches_per_view[:index].sum())
        part = slice(start, start + layout.patches)
        total = self.layout.patches
        signals = {}
        for key, value in self.signals.items():
            unit = unit_of(key)
            whole = unit == "prompt" or (unit == "patch" and value.shape[:1] != (total,))
            signals[key] = value if whole else value[slice(index, index + 1) if unit == "view" else part]
        budget = None if self.budget is None else self.budget[index : index + 1]
        return replace(self, features=self.features[part], layout=layout, signals=signals, budget=budget)


@dataclass
class PromptSample:
    """Inputs of the LLM for one prompt row, in front of its first layer.

    Attributes
    ----------
    visual : Tensor [V, D]
        Visual patch tokens that enter the LLM.
    text : Tensor [T, D]
        Embeddings of the text behind the last visual token.
    """

    visual: Tensor
    text: Tensor


@dataclass
class DecoderSample:
    """The visual tokens of one prompt row at one cut inside the LLM.

    Attributes
    ----------
    hidden : Tensor [n, D]
        States of the visual patch tokens still alive, in reading order (with row separators among them for methods
        that cut these too).
    layer
        Index of the decoder layer at which the cut is, see `tokensieve.core.cuts`.
    entered
        Number of visual patch tokens of the row that entered the LLM.
    uncompressed : Tensor [items], optional
        Patches of every visual item of the row before any compression.
    view, item : Tensor [n]
        Frame (counted over all items of the row) and item of every token.
    signals
        Requested decoder signals by name; those over ``n + T`` tokens hold the visual ones first.
    memory
        What the method remembered of this row: of its prompt, and at earlier cuts.
    budget : Tensor [frames], optional
        Number of tokens every frame of the row may keep, when a frame-budget module allocates.
    cut : Cut, optional
        The cut itself.
    patch : Tensor [n], optional
        Patch of its item that every token stands for; -1 for separators.
    cell : Tensor [n], optional
        Number of the grid cell of every token, the same for the same place in all frames of a video; views of an image
        have cells of their own, and separators cells behind their grid row.
    text_item : Tensor [T'], optional
        For every text token of the row the item that it stands behind, -1 in front of the first one.
    infos
        What the plan of every item said in front of the LLM.
    tower
        Requested tower signals of the tokens, by the text of the request.
    """

    hidden: Tensor
    layer: int
    entered: int
    view: Tensor
    item: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    budget: Tensor | None = None
    facts: HostFacts | None = None
    uncompressed: Tensor | None = None
    cut: Cut | None = None
    patch: Tensor | None = None
    cell: Tensor | None = None
    text_item: Tensor | None = None
    infos: Sequence[Mapping[str, Any]] = ()
    tower: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def attention(self) -> Tensor:
        """Attention of the last prompt token in the layer before, mean over heads, float32 [n]."""
        return self.signal("decoder.last_query_attention")

    def signal(self, name: str) -> Tensor:
        """A requested signal, or a MethodError that names it."""
        if name not in self.signals:
            raise MethodError(f"The signal {name!r} was not requested or not provided.")
        return self.signals[name]


@dataclass
class StepSample:
    """The visual entries in the cache while one token of one row is decoded.

    Attributes
    ----------
    attention : Tensor [n]
        Attention of that token to the visual entries in the decoder layer before those that may see less, mean over
        heads, float32; not scaled to a sum of one.
    memory
        What the method remembered of earlier steps of the same answer.
    facts : HostFacts
        About the host.
    """

    attention: Tensor
    memory: dict[str, Any]
    facts: HostFacts
