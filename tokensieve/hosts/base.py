"""What a host says about its model family."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import ItemKind, Separators
from tokensieve.core.sample import HostFacts
from tokensieve.core.signals import SIGNALS, Availability, SignalRequest
from tokensieve.errors import HostError, SignalError
from tokensieve.hosts.towers import PictureTower
from tokensieve.pairing.geometry import VisionGeometry, find_source

_CLASS_TOKEN_SIGNALS = (
    "encoder.class_attention",
    "encoder.patch_attention",
    "encoder.given_attention",
    "encoder.joined_keys",
    "encoder.joined_class_attention",
)


class Host:
    """One model family: module paths, token layout, position scheme, signal providers. Knows no method.

    ``ragged_frames`` says, where the family's own processor leaves tokens out, how to get whole frames;
    ``drops_frames`` whether frames can be left out before they are encoded; ``patch_tokens`` whether every patch of
    the tower is one token of the LLM; ``projects_patches`` whether the projector takes patch by patch;
    ``drops_packed`` whether patches can be dropped inside a tower that takes all pictures as one sequence;
    ``merges_patches`` whether the tower itself joins neighbouring patches; ``tiled_images`` whether an image may be
    several pictures; ``question_guided`` whether the visual tokens that enter the LLM depend on the question, so that
    those of one question serve no other.

    The paths are relative to the base model (``model.model`` of a ``...ForConditionalGeneration``), which runs
    the encoder, scatters its features over the placeholders and calls the language model.
    """

    slug: ClassVar[str] = ""
    title: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[ItemKind, ...]] = ("image", "video")
    layout_note: ClassVar[str] = ""
    position_axes: ClassVar[int] = 1
    language_model: ClassVar[str] = "language_model"
    decoder_layers: ClassVar[str] = "layers"
    vision_tower: ClassVar[str] = "vision_tower"
    drops_frames: ClassVar[bool] = True
    window_attention: ClassVar[bool] = False
    ragged_frames: ClassVar[str] = ""
    absent: ClassVar[Mapping[str, str]] = {}
    video_separators: ClassVar[Separators] = "none"
    patch_tokens: ClassVar[bool] = False
    projects_patches: ClassVar[bool] = False
    merges_patches: ClassVar[bool] = False
    tiled_images: ClassVar[bool] = False
    drops_packed: ClassVar[bool] = False
    question_guided: ClassVar[bool] = False

    def tower(self, base: Any) -> PictureTower:
        """How attention is read out of this family's vision tower."""
        raise HostError(f"{self.slug} describes no vision tower.")

    def tower_module(self, base: Any) -> Any:
        """The vision tower itself."""
        return base.get_submodule(self.vision_tower)

    def text_model(self, base: Any) -> Any:
        """The language model without its head."""
        return base.get_submodule(self.language_model)

    def layers(self, base: Any) -> nn.ModuleList:
        """Decoder layers of the language model."""
        layers = self.text_model(base).get_submodule(self.decoder_layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def facts(self, base: Any) -> HostFacts:
        """Numbers that methods choose defaults by."""
        tower = self.tower(base)
        return HostFacts(
            family=self.slug,
            decoder_layers=len(self.layers(base)),
            tower_layers=len(tower.attentions(self.tower_module(base))),
            feature_layer=self.feature_layer(base),
            has_class_token=tower.class_token,
            position_axes=self.position_axes,
            deepstack_layers=self.deepstack_layers(base),
            window_attention=self.window_attention,
            patch_tokens=self.patch_tokens,
            tiled_images=self.tiled_images,
            drops_packed=self.drops_packed,
            tower_pair=self.tower_pair(base),
            text_tower=self.text_tower(base),
            video_separators=self.video_separators,
        )

    def tower_pair(self, base: Any) -> str:
        """Kind of the contrastive pair that the tower is half of, empty where it is none or takes packed patches."""
        geometry = VisionGeometry.of(base.config.vision_config)
        return "" if geometry is None or self.tower(base).packed else geometry.kind

    def text_tower(self, base: Any) -> str | None:
        """Where the text half of that pair is known to be."""
        source = find_source(base.config.vision_config) if self.tower_pair(base) else None
        return None if source is None else source.location

    def feature_layer(self, base: Any) -> int:
        """Index from zero of the tower layer whose output is projected."""
        depth = len(self.tower(base).attentions(self.tower_module(base)))
        chosen = getattr(base.config, "vision_feature_layer", -1)
        chosen = chosen[-1] if isinstance(chosen, (list, tuple)) else chosen
        return (chosen if chosen >= 0 else depth + 1 + chosen) - 1

    def deepstack_layers(self, base: Any) -> int:
        """Number of first decoder layers that receive extra visual features."""
        return 0

    def availability(self, name: str, base: Any, text_tower: Any = None) -> Availability:
        """Whether a signal is native, recomputed, an extra pass, or absent.

        Parameters
        ----------
        text_tower
            What the user named as the text half of the tower's pair; None counts on what is known.
        """
        if name in self.absent:
            return "absent"
        if name in _CLASS_TOKEN_SIGNALS:
            return "recomputed" if self.tower(base).class_token else "absent"
        if name not in SIGNALS:
            return "absent"
        if SIGNALS[name].pair:
            known = text_tower is not None or self.text_tower(base) is not None
            return "extra pass" if known and self.tower_pair(base) in SIGNALS[name].pair else "absent"
        if name == "encoder.states" and not self.projects_patches:
            return "absent"
        if name == "encoder.mean_query_attention" and not self.merges_patches:
            return "absent"
        if name == "tower.packed_blocks":
            return "native" if self.drops_packed else "absent"
        if name.startswith("tower.") and not self._open_tower(base):
            return "absent"
        if name == "tower.class_token" and not self.tower(base).class_token:
            return "absent"
        if name == "encoder.pixel_entropy" and self.tower(base).pixels is None:
            return "absent"
        whole = self.drops_packed or (self.patch_tokens and self._open_tower(base))
        if name == "encoder.groups" and not whole:
            return "absent"
        native = ("tokens.features", "encoder.states", "decoder.hidden_states", "frames.count", "prompt.newline")
        return "native" if name in native else "recomputed"

    def why_absent(self, name: str) -> str:
        """One clause on why a signal does not exist here."""
        if name in self.absent:
            return self.absent[name]
        if name in ("encoder.class_attention", "tower.class_token"):
            return "its vision tower has no class token"
        if name in SIGNALS and SIGNALS[name].pair:
            kinds = " or ".join({"clip": "CLIP", "siglip": "SigLIP"}[kind] for kind in SIGNALS[name].pair)
            return (
                f"its vision tower is no {kinds} tower of which the text half is known (name that as text_tower if it "
                "is one)"
            )
        if name == "encoder.states":
            return "its projector does not take patch by patch"
        if name == "encoder.mean_query_attention":
            return "its vision tower merges no patches"
        if name.startswith("encoder.joined_"):
            return "its vision tower has no class token"
        if name == "encoder.pixel_entropy":
            return "its tower takes packed patches instead of pictures"
        if name == "encoder.groups":
            return "patches are pooled on their grid between the tower and the LLM"
        if name == "tower.blocks":
            return "its tower packs all pictures into one sequence, or several of its layers are projected"
        if name in ("encoder.patch_attention", "encoder.given_attention"):
            return "its vision tower has no class token, so that encoder.received_attention says it all"
        return "nothing in this family gives it"

    def _open_tower(self, base: Any) -> bool:
        """Whether sequences can be shortened inside the tower: pictures in a batch, one projected layer."""
        several = isinstance(getattr(base.config, "vision_feature_layer", -1), (list, tuple))
        return not several and not self.tower(base).packed

    def resolve_layer(self, base: Any, request: SignalRequest) -> int:
        """Tower layer (from zero) that a request means."""
        depth = len(self.tower(base).attentions(self.tower_module(base)))
        layer = request.layer if request.layer is not None else "feature"
        if layer == "feature":
            return self.feature_layer(base)
        if layer == "last":
            return depth - 1
        if not isinstance(layer, int) or not -depth <= layer < depth:
            raise SignalError(f"{request} asks for tower layer {layer}, but the tower has layers 0..{depth - 1}.")
        return layer % depth

    def placeholder_id(self, base: Any, modality: ItemKind) -> int | None:
        """Token id that stands for a visual feature of a modality."""
        return getattr(base.config, f"{modality}_token_id", None)

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """Visual items of an encoder call, from the arguments alone."""
        raise HostError(f"{self.slug} does not describe its {call.modality}s.")

    def regroup(self, base: Any, call: EncodeCall, ids: Tensor, arguments: Mapping[str, Any]) -> list[EncodedItem]:
        """Items as the prompt holds them.

        A hook for families that encode video frames as single pictures, or that pass only some tokens on.

        Parameters
        ----------
        ids : Tensor [B, L]
            Token ids of the prompt on the CPU.
        arguments
            Arguments of the composite model's forward pass.
        """
        return call.items

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """A raw tower signal of one item, brought to its tokens as the features are [patches]."""
        raise HostError(f"{self.slug} cannot bring tower signals to its tokens.")

    def pool_channels(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """A raw tower signal of one item with channels in its last axis, as `pool` does with each [patches, C]."""
        return torch.stack([self.pool(base, call, item, channel) for channel in raw.unbind(-1)], dim=-1)

    def pool_views(self, item: EncodedItem, raw: Tensor) -> Tensor:
        """A raw signal of the pictures of one item as one value for each of its views [F, C]."""
        views = len(item.layout.views)
        if raw.shape[0] == views:
            return raw
        # The first view of an image cut into tiles is its base picture, the second the mosaic of the tiles.
        return torch.cat((raw[: views - 1], raw[views - 1 :].mean(0, keepdim=True)))

    def project(self, base: Any, states: Tensor) -> Tensor:
        """Tower states [m, C] through the projector [m, D], where it takes patch by patch."""
        raise SignalError(f"The projector of {self.slug} does not take patch by patch.")

    def with_frames(self, base: Any, call: EncodeCall, keeps: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of the encoder call with only some frames of every video."""
        raise HostError(f"{self.slug} cannot encode a subset of frames.")

    def decoder_rotary(self, attention: Any) -> Any:
        """The rotary function that the family's decoder attention uses."""
        return sys.modules[type(attention).__module__].apply_rotary_pos_emb


def square_pool(raw: Tensor, side: int, size: tuple[int, int], mode: str) -> Tensor:
    """Pool per-picture patch signals [B, side*side] to [B, size] with the 2-d pooling that the features get."""
    grid = raw.float().view(raw.shape[0], 1, side, side)
    if mode == "average":
        return nn.functional.avg_pool2d(grid, 2).flatten(1)
    return nn.functional.interpolate(grid, size=size, mode=mode).flatten(1)


def as_list(sizes: Any) -> list[list[int]]:
    """Nested integers from a tensor or sequence of (height, width) or (t, h, w)."""
    return torch.as_tensor(sizes).tolist()
