"""PPLLaVA as a host: its pooled tokens may be compressed further by any method that fits.

Kept beside the model because the model itself has to be registered with transformers first; `register_host` makes
tokensieve's commands and `compress` know it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.hosts.base import Host
from tokensieve.hosts.registry import register
from tokensieve.hosts.towers import PictureTower
from tokensieve.models.ppllava.encoding import slots_of
from tokensieve.models.ppllava.pooling import prompt_guided_pool, resolve_window
from tokensieve.models.ppllava.views import pack_views, tile_shape, view_count

__all__ = ["PPLlavaHost", "register_host"]


class PPLlavaHost(Host):
    """Videos as pooled space-time grids without separators; images as pooled views, tiles with row newlines."""

    slug = "ppllava"
    title = "PPLLaVA"
    model_types = ("ppllava",)
    layout_note = "16 x 8 x 8 tokens of 32 frames, no newline; images as LLaVA-NeXT with 8 x 8 tokens a view"
    drops_frames = False
    question_guided = True

    def tower(self, base: Any) -> PictureTower:
        """CLIP carries a class token, SigLIP does not; the temporal branch keeps the tower one level deeper."""
        path = "vision_model.encoder.layers" if base.config.bt_adapter_depth else "encoder.layers"
        return PictureTower(path, class_token=base.config.pair == "clip")

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """One item per placeholder; placeholders that show the same clip share its tower states."""
        return [EncodedItem(layout, units) for layout, units in self._slots(base, call)]

    def _slots(self, base: Any, call: EncodeCall) -> Iterator[tuple[Layout, slice]]:
        """Layout and tower rows of every placeholder."""
        config, arguments = base.config, call.arguments
        pixels = arguments[call.pixel_key]
        kind = call.modality
        counts, index = (arguments.get(name) for name in (f"batch_num_{kind}s", f"{kind}_index"))
        questions = arguments.get("question_ids")
        rows = None if questions is None or config.weighting == "average" else questions.shape[0]
        slots = slots_of(counts, index, pixels.shape[0], rows, kind)
        sizes = self._pictures(base, call, slots)
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        for row in slots:
            for entry in row:
                units = slice(starts[entry], starts[entry] + sizes[entry])
                if kind == "video":
                    _, grid = self._window(base, sizes[entry], config.video_kernel)
                    layout = Layout.regular("video", *grid)
                elif len(row) == 1:
                    layout = self._single_image(base, arguments["image_sizes"][entry].tolist())
                else:
                    layout = Layout.regular("image", *self._window(base, 1, config.image_kernel)[1])
                yield layout, units

    @staticmethod
    def _pictures(base: Any, call: EncodeCall, slots: list[list[int]]) -> list[int]:
        """Pictures that the tower sees of every clip or image."""
        config, arguments = base.config, call.arguments
        pixels = arguments[call.pixel_key]
        if call.modality == "video":
            frames = arguments.get("video_frames")
            return [pixels.shape[1]] * pixels.shape[0] if frames is None else [int(count) for count in frames]
        single = {row[0] for row in slots if len(row) == 1}
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        sizes = arguments["image_sizes"].tolist()
        return [view_count(size, pinpoints, side) if entry in single else 1 for entry, size in enumerate(sizes)]

    @staticmethod
    def _window(base: Any, frames: int, kernel: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Kernel and pooled grid for a number of frames."""
        wanted = (min(int(kernel[0]), frames), int(kernel[1]), int(kernel[2]))
        side = base.config.side
        return wanted, resolve_window((frames, side, side), kernel=wanted).output

    def _single_image(self, base: Any, size: list[int]) -> Layout:
        """Cells of the base view and of the mosaic, found by sending marks through the packing."""
        _, (_, rows, columns) = self._window(base, 1, base.config.image_kernel)
        tiles = tile_shape(size, base.config.image_grid_pinpoints, base.config.vision_config.image_size)
        if tiles is None:
            return Layout.regular("image", 1, rows, columns, "end")
        views = torch.zeros(1 + tiles[0] * tiles[1], rows, columns, 1)
        marks = pack_views(views, size, tiles, torch.ones(1))[rows * columns :, 0] > 0.5
        width = int(marks.long().argmax())
        height = marks.numel() // (width + 1)
        parts = [Layout.regular("image", 1, rows, columns), Layout.regular("image", 1, height, width, "row")]
        cells = [
            torch.stack((torch.full_like(part.row, number), part.row, part.column), 1)
            for number, part in enumerate(parts)
        ]
        return Layout.from_cells("image", [(rows, columns), (height, width)], torch.cat(cells))

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """Windows of a signal are averaged, whatever the question weighs."""
        values = raw.float() if raw.dim() == 3 else raw.float()[..., None]
        kernel = base.config.video_kernel if call.modality == "video" else base.config.image_kernel
        window, _ = self._window(base, values.shape[0], kernel)
        side = base.config.side
        pooled = prompt_guided_pool(values, grid=(side, side), kernel=window)
        # Only a prompt's single image is closed by newlines.
        if call.modality == "image" and item.layout.tokens > item.layout.patches:
            number = next(place for place, own in enumerate(call.items) if own is item)
            index = call.arguments.get("image_index")
            size = call.arguments["image_sizes"][number if index is None else int(index[number])].tolist()
            tiles = tile_shape(size, base.config.image_grid_pinpoints, base.config.vision_config.image_size)
            packed = pack_views(pooled, size, tiles, torch.zeros(pooled.shape[-1]))
            pooled = packed[item.layout.patch_tokens.to(packed.device)]
        pooled = pooled.reshape(item.layout.patches, -1)
        return pooled if raw.dim() == 3 else pooled[:, 0]


def register_host() -> None:
    """Make tokensieve know PPLLaVA as a host; calling it again changes nothing."""
    register(PPLlavaHost)
