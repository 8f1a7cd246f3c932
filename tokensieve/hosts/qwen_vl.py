"""The Qwen-VL families: packed patches, 2 x 2 merging, three position axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.hosts.base import Host, as_list
from tokensieve.hosts.registry import register
from tokensieve.hosts.towers import PackedTower


class _PackedHost(Host):
    """Families whose encoder takes patches of all pictures in one row, described by (t, h, w) grids."""

    vision_tower = "visual"

    def tower(self, base: Any) -> PackedTower:
        """Blocks with fused projections and rotary embeddings."""
        return PackedTower("blocks", "attn")

    def feature_layer(self, base: Any) -> int:
        """The merger reads the last block."""
        return len(self.tower_module(base).blocks) - 1

    def merge_sizes(self, base: Any, call: EncodeCall) -> list[int]:
        """Side of the square of patches that becomes one token, per item."""
        return [self.tower_module(base).spatial_merge_size] * len(self.grids(call))

    def grids(self, call: EncodeCall) -> list[list[int]]:
        """(t, h, w) of every item in patches."""
        grids = call.arguments.get(f"{call.modality}_grid_thw")
        return as_list(grids if grids is not None else call.arguments["image_grid_thw"])

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """One view per temporal step of the grid."""
        items, start = [], 0
        for (t, h, w), merge in zip(self.grids(call), self.merge_sizes(base, call), strict=True):
            layout = Layout.regular(call.modality, t, h // merge, w // merge)
            items.append(EncodedItem(layout, slice(start, start + t * h * w)))
            start += t * h * w
        return items

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """Mean over the patches that are merged into a token; sums over queries become means over a frame."""
        steps = len(item.layout.views)
        return raw.float().view(item.layout.patches, -1).mean(1) / (raw.numel() // steps)

    def with_frames(self, base: Any, call: EncodeCall, keeps: Sequence[Tensor]) -> dict[str, Any]:
        """Fewer temporal steps in the packed patches and their grids."""
        pixels, parts, grids = call.arguments[call.pixel_key], [], []
        start = 0
        for (t, h, w), keep in zip(self.grids(call), keeps, strict=True):
            block = pixels[start : start + t * h * w].view(t, h * w, -1)
            parts.append(block[keep.to(pixels.device)].flatten(0, 1))
            grids.append([keep.numel(), h, w])
            start += t * h * w
        given = call.arguments[f"{call.modality}_grid_thw"]
        grid = torch.tensor(grids, dtype=given.dtype, device=given.device)
        return {**call.arguments, call.pixel_key: torch.cat(parts), f"{call.modality}_grid_thw": grid}


class _QwenVL(_PackedHost):
    """Three position axes on the language side."""

    position_axes = 3
    merges_patches = True

    def tower(self, base: Any) -> PackedTower:
        """Blocks with fused projections; the merger joins squares of patches that follow each other."""
        return PackedTower("blocks", "attn", group=self.tower_module(base).spatial_merge_size ** 2)


@register
class Qwen2VL(_QwenVL):
    """Qwen2-VL."""

    slug = "qwen2_vl"
    drops_packed = True
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    layout_note = "2 frames and 2 x 2 patches a token, no newline, 3-axis positions"


@register
class Qwen25VL(_QwenVL):
    """Qwen2.5-VL: most tower blocks attend inside windows, and patches are permuted window by window."""

    slug = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    window_attention = True
    layout_note = "2 frames and 2 x 2 patches a token, no newline, 3-axis positions in seconds"

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """As the family, after undoing the window permutation inside the item."""
        order = self._window_order(base, call, item)
        groups = raw.view(item.layout.patches, -1)
        restored = torch.empty_like(groups)
        restored[order.to(raw.device)] = groups
        return super().pool(base, call, item, restored.flatten())

    def _window_order(self, base: Any, call: EncodeCall, item: EncodedItem) -> Tensor:
        """Token (merge group) at every place of the permuted item.

        Windows tile the merged grid of each temporal step row by row; the windows at the right and bottom rim
        are smaller.
        """
        tower = self.tower_module(base)
        window = tower.window_size // tower.spatial_merge_size // tower.patch_size
        layout = item.layout
        columns = -(-layout.views[0][1] // window)
        rows = -(-layout.views[0][0] // window)
        tile = (layout.view * rows + layout.row // window) * columns + layout.column // window
        return torch.sort(tile, stable=True).indices


@register
class Qwen3VL(_QwenVL):
    """Qwen3-VL: timestamps between temporal steps, DeepStack features in the first decoder layers."""

    slug = "qwen3_vl"
    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    layout_note = "2 frames and 2 x 2 patches a token, a timestamp in front of each step, DeepStack, 3-axis positions"

    def deepstack_layers(self, base: Any) -> int:
        """One decoder layer per tower level that is passed on."""
        return len(base.config.vision_config.deepstack_visual_indexes)


@register
class VideoLlama3(_PackedHost):
    """VideoLLaMA3: SigLIP with rotary positions, bilinear 2 x 2 reduction of videos, plain positions."""

    slug = "video_llama_3"
    title = "VideoLLaMA3"
    model_types = ("video_llama_3",)
    vision_tower = "vision_model"
    ragged_frames = "build the inputs with use_token_compression=False"
    layout_note = "2 x 2 patches a token in videos, 1 in images; timestamps in the text"

    def tower(self, base: Any) -> PackedTower:
        """Separate projections and rotary embeddings."""
        return PackedTower("encoder.layers", "self_attn")

    def feature_layer(self, base: Any) -> int:
        """The projector reads the last layer."""
        return len(self.tower_module(base).encoder.layers) - 1

    def merge_sizes(self, base: Any, call: EncodeCall) -> list[int]:
        """Given with every call."""
        sizes = call.arguments.get(f"{call.modality}_merge_sizes")
        return torch.as_tensor(sizes if sizes is not None else call.arguments["image_merge_sizes"]).tolist()

    def regroup(self, base: Any, call: EncodeCall, ids: Tensor, arguments: Mapping[str, Any]) -> list[EncodedItem]:
        """The processor may have left out tokens that hardly differ from the frame before."""
        mask = arguments.get("video_compression_mask")
        if call.modality != "video" or mask is None or bool(mask.all()):
            return call.items
        items, start = [], 0
        for whole in call.items:
            present = mask[start : start + whole.layout.tokens].cpu().nonzero().flatten()
            start += whole.layout.tokens
            part = whole.layout.of_tokens(present)
            items.append(EncodedItem(part, whole.units, whole.frames_kept, whole=whole, present=present))
        return items
