"""InternVL: pixel shuffle, tiles of images and frames of videos through the same picture encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import ItemKind, Layout
from tokensieve.hosts.base import Host
from tokensieve.hosts.registry import register
from tokensieve.hosts.towers import PictureTower


@register
class InternVL(Host):
    """InternVL 2.5 / 3: every tile or frame is a picture of its own; the prompt says which belong together."""

    slug = "internvl"
    title = "InternVL"
    model_types = ("internvl",)
    modalities = ("image",)
    drops_frames = False
    layout_note = "pixel-shuffled pictures; video frames introduced by 'FrameN:' in the text"

    def tower(self, base: Any) -> PictureTower:
        """A ViT with class token and optional query / key norms."""
        return PictureTower("encoder.layer", "attention", class_token=True)

    def side(self, base: Any) -> int:
        """Tokens along one side of a picture after the pixel shuffle."""
        config = base.config
        size, patch = config.vision_config.image_size, config.vision_config.patch_size
        size = size[0] if isinstance(size, (list, tuple)) else size
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        return int(size // patch * config.downsample_ratio)

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        """Single pictures; `regroup` joins those that one tile mosaic or video consists of."""
        side = self.side(base)
        count = call.arguments[call.pixel_key].shape[0]
        return [EncodedItem(Layout.regular("image", 1, side, side), slice(i, i + 1)) for i in range(count)]

    def regroup(
        self, base: Any, call: EncodeCall, ids: Tensor, arguments: Mapping[str, Any]
    ) -> list[EncodedItem]:
        """Tiles of one image form one run of placeholders; frames of one video follow each other with the same
        words in between.

        The text in front of a frame differs from that of the next frame only in its number, so runs of one
        picture each are joined while the token before the number repeats and the first frame's label does not
        come again.
        """
        items, side = call.items, self.side(base)
        grouped: list[EncodedItem] = []
        cursor = 0
        total = sum(self._pictures(row, base) for row in ids)
        copies = max(1, total // max(1, len(items)))
        for row in ids[::copies]:
            for kind, pictures in self._groups(row, base):
                if cursor + pictures > len(items):
                    return items
                layout = Layout.regular(kind, pictures, side, side)
                units = slice(items[cursor].units.start, items[cursor + pictures - 1].units.stop)
                grouped.append(EncodedItem(layout, units))
                cursor += pictures
        return grouped if cursor == len(items) else items

    def _pictures(self, row: Tensor, base: Any) -> int:
        return int(torch.eq(row, base.config.image_token_id).sum()) // self.side(base) ** 2

    def _groups(self, row: Tensor, base: Any) -> list[tuple[ItemKind, int]]:
        """(kind, pictures) of the visual items of one prompt row, in order."""
        each = self.side(base) ** 2
        visual = torch.eq(row, base.config.image_token_id)
        edges = torch.diff(visual.long(), prepend=torch.zeros(1, dtype=torch.long))
        starts = (edges == 1).nonzero().flatten().tolist()
        lengths = [int((~visual[start:]).long().argmax()) or len(row) - start for start in starts]
        groups: list[tuple[ItemKind, int]] = []
        label: list[int] | None = None
        previous_end = 0
        for start, length in zip(starts, lengths, strict=True):
            before = row[previous_end:start].tolist()
            previous_end = start + length
            is_frame = length == each and self._is_frame_label(before)
            if is_frame and label is not None and groups and before[-4:] != label:
                groups[-1] = ("video", groups[-1][1] + 1)
                continue
            label = before[-4:] if is_frame else None
            groups.append(("video" if is_frame else "image", length // each))
        return groups

    @staticmethod
    def _is_frame_label(before: list[int]) -> bool:
        """Whether the tokens in front of a picture end like a frame label: words, then the start token."""
        return len(before) >= 4

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """Mean over the patches that the pixel shuffle folds into one token."""
        side = int(raw.shape[1] ** 0.5)
        grid = raw.float().view(raw.shape[0], side, side, 1)
        return base.pixel_shuffle(grid, scale_factor=base.config.downsample_ratio).mean(-1).flatten()
