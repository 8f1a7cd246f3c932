"""The LLaVA lineage: LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision and LLaVA-Video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout, Separators
from tokensieve.hosts.base import Host, as_list, square_pool
from tokensieve.hosts.registry import register
from tokensieve.hosts.towers import CLIP_PIXELS, SIGLIP_PIXELS, PictureTower


class _LlavaHost(Host):
    """What the families share: a picture tower, a square patch grid, videos as stacked frames."""

    projects_patches = True

    def side(self, base: Any) -> int:
        """Patches along one side of a picture."""
        vision = base.config.vision_config
        return vision.image_size // vision.patch_size

    def tower(self, base: Any) -> PictureTower:
        """CLIP carries a class token, SigLIP does not."""
        clip = "clip" in base.config.vision_config.model_type
        return PictureTower("encoder.layers", class_token=clip, pixels=CLIP_PIXELS if clip else SIGLIP_PIXELS)

    def video_grid(self, base: Any) -> tuple[int, int]:
        """Rows and columns of a pooled video frame."""
        side = self.side(base)
        return side, side

    def pool_frames(self, base: Any, raw: Tensor) -> Tensor:
        """Patch signals of frames [F, side*side] as the frame features are pooled [F, rows*columns]."""
        return raw

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """Videos from the shape of their pixels, images from their sizes."""
        if call.modality == "image":
            return self.describe_images(base, call)
        videos, frames = call.arguments[call.pixel_key].shape[:2]
        rows, columns = self.video_grid(base)
        layout = Layout.regular("video", frames, rows, columns, self.video_separators)
        return [EncodedItem(layout, slice(i * frames, (i + 1) * frames)) for i in range(videos)]

    def describe_images(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """One picture, one grid."""
        side = self.side(base)
        count = call.arguments[call.pixel_key].shape[0]
        return [EncodedItem(Layout.regular("image", 1, side, side), slice(i, i + 1)) for i in range(count)]

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """Frames are pooled like the features; pictures map one to one."""
        return (self.pool_frames(base, raw) if call.modality == "video" else raw).flatten()

    def pool_channels(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """All channels at once, each as a picture of its own."""
        if call.modality != "video":
            return raw.flatten(0, 1)
        pooled = self.pool_frames(base, raw.transpose(1, 2).flatten(0, 1))
        return pooled.unflatten(0, (raw.shape[0], -1)).transpose(1, 2).flatten(0, 1)

    def project(self, base: Any, states: Tensor) -> Tensor:
        """Through the projector, in its dtype."""
        projector = base.multi_modal_projector
        with torch.no_grad():
            tokens: Tensor = projector(states.to(next(projector.parameters()).dtype))
        return tokens

    def with_frames(self, base: Any, call: EncodeCall, keeps: Sequence[Tensor]) -> dict[str, Any]:
        """Fewer frames in ``pixel_values_videos``; all videos of a call have equally many."""
        pixels = call.arguments[call.pixel_key]
        chosen = torch.stack([video[keep.to(pixels.device)] for video, keep in zip(pixels, keeps, strict=True)])
        return {**call.arguments, call.pixel_key: chosen}


class _AnyResolutionHost(_LlavaHost):
    """Images as a base picture followed by a mosaic of tiles, unpadded, with a newline behind each mosaic row."""

    tiled_images = True

    def describe_images(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """Cells found by sending coordinates through the model's own packing of tiles."""
        items, start = [], 0
        for tiles, size in zip(self._tiles(base, call), as_list(call.arguments["image_sizes"]), strict=True):
            layout = self._layout(base, tiles, size, call)
            items.append(EncodedItem(layout, slice(start, start + tiles)))
            start += tiles
        return items

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """Signals of tiles travel through the same packing as the features."""
        if call.modality == "video":
            return super().pool(base, call, item, raw)
        index = next(i for i, other in enumerate(call.items) if other is item)
        size = as_list(call.arguments["image_sizes"])[index]
        packed = self._pack(base, raw.unsqueeze(-1).float(), size, call, separator=0.0)
        return packed[item.layout.patch_tokens.to(packed.device), 0]

    def pool_channels(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """All channels at once, through the same packing."""
        if call.modality == "video":
            return super().pool_channels(base, call, item, raw)
        index = next(i for i, other in enumerate(call.items) if other is item)
        size = as_list(call.arguments["image_sizes"])[index]
        packed = self._pack(base, raw.float(), size, call, separator=0.0)
        return packed[item.layout.patch_tokens.to(packed.device)]

    def _tiles(self, base: Any, call: EncodeCall) -> list[int]:
        """Number of pictures that each image was cut into, the base picture included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = base.config
        counts = call.arguments.get("batch_num_images")
        sizes = as_list(call.arguments["image_sizes"])
        patched = [True] * len(sizes)
        if counts is not None:
            patched = [n == 1 for n in torch.as_tensor(counts).tolist() for _ in range(n)]
        return [
            image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=config.image_grid_pinpoints,
                patch_size=config.vision_config.image_size,
            )
            if split
            else 1
            for size, split in zip(sizes, patched, strict=True)
        ]

    def _pack(self, base: Any, tiles: Tensor, size: list[int], call: EncodeCall, separator: float) -> Tensor:
        """Per-tile values [tiles, side*side, C] in the order of the image's tokens [T, C]."""
        newline = torch.full((tiles.shape[-1],), separator, device=tiles.device, dtype=tiles.dtype)
        sizes = torch.tensor([size])
        packed, _ = base.pack_image_features([tiles], sizes, **self._packing_options(base, call), image_newline=newline)
        return packed[0]

    def _packing_options(self, base: Any, call: EncodeCall) -> dict[str, Any]:
        strategy = call.arguments.get("vision_feature_select_strategy")
        return {"vision_feature_select_strategy": strategy or base.config.vision_feature_select_strategy}

    def _layout(self, base: Any, tiles: int, size: list[int], call: EncodeCall) -> Layout:
        side = self.side(base)
        marks = self._pack(base, torch.zeros(tiles, side * side, 1), size, call, separator=1.0)[:, 0] > 0.5
        if tiles == 1:
            rows, columns, views = side, side, [(side, side)]
        else:
            mosaic = marks[side * side :]
            columns = int(mosaic.long().argmax())
            rows = mosaic.numel() // (columns + 1)
            views = [(side, side), (rows, columns)]
        cells = [Layout.regular("image", 1, side, side, "end" if tiles == 1 else "none")]
        if tiles > 1:
            cells.append(Layout.regular("image", 1, rows, columns, "row"))
        stacked = torch.cat(
            [
                torch.stack((torch.where(part.view < 0, -1, index), part.row, part.column), 1)
                for index, part in enumerate(cells)
            ]
        )
        return Layout.from_cells("image", views, stacked)


@register
class Llava(_LlavaHost):
    """LLaVA-1.5: one picture of CLIP patches, no separators."""

    slug = "llava"
    title = "LLaVA-1.5"
    model_types = ("llava",)
    modalities = ("image",)
    patch_tokens = True
    layout_note = "24 x 24 patches a picture, no newline"


@register
class LlavaNext(_AnyResolutionHost):
    """LLaVA-NeXT (1.6): base picture and a mosaic of tiles with a newline behind each row."""

    slug = "llava_next"
    title = "LLaVA-NeXT"
    model_types = ("llava_next",)
    modalities = ("image",)
    patch_tokens = True
    layout_note = "base picture + unpadded mosaic, a newline behind each mosaic row"


@register
class LlavaNextVideo(_AnyResolutionHost):
    """LLaVA-NeXT-Video: frames pooled by the resampler, no separators between frames."""

    slug = "llava_next_video"
    title = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    layout_note = "12 x 12 patches a frame, no newline; images as LLaVA-NeXT"

    def video_grid(self, base: Any) -> tuple[int, int]:
        """The resampler divides each side by its stride."""
        side = self.side(base) // base.config.spatial_pool_stride
        return side, side

    def pool_frames(self, base: Any, raw: Tensor) -> Tensor:
        """Through the model's own resampler (average, max or convolution falls back to average)."""
        side, stride = self.side(base), base.config.spatial_pool_stride
        grid = raw.float().view(-1, 1, side, side)
        if base.config.spatial_pool_mode == "max":
            return nn.functional.max_pool2d(grid, stride, stride).flatten(1)
        return nn.functional.avg_pool2d(grid, stride, stride).flatten(1)


@register
class LlavaOnevision(_AnyResolutionHost):
    """LLaVA-OneVision: frames pooled to half by bilinear interpolation, one newline behind the whole video."""

    slug = "llava_onevision"
    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    video_separators: ClassVar[Separators] = "end"
    layout_note = "14 x 14 patches a frame, one newline behind the video; images any-resolution"

    def video_grid(self, base: Any) -> tuple[int, int]:
        """Half of each side, rounded up."""
        side = math.ceil(self.side(base) / 2)
        return side, side

    def pool_frames(self, base: Any, raw: Tensor) -> Tensor:
        """The bilinear pooling that the features get."""
        return square_pool(raw, self.side(base), self.video_grid(base), "bilinear")

    def _packing_options(self, base: Any, call: EncodeCall) -> dict[str, Any]:
        aspect = call.arguments.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": aspect or base.config.vision_aspect_ratio}


@register
class LlavaVideo(LlavaOnevision):
    """LLaVA-Video: frames averaged 2 x 2 (floor) with a newline behind each grid row."""

    slug = "llava_video"
    title = "LLaVA-Video"
    model_types = ("llava_video",)
    video_separators: ClassVar[Separators] = "row"
    layout_note = "13 x 13 patches a frame, a newline behind each row; images any-resolution"

    def video_grid(self, base: Any) -> tuple[int, int]:
        """Half of each side, rounded down."""
        side = self.side(base) // 2
        return side, side

    def pool_frames(self, base: Any, raw: Tensor) -> Tensor:
        """The average pooling that the features get."""
        return square_pool(raw, self.side(base), self.video_grid(base), "average")
