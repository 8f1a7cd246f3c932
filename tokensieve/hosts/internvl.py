"""InternVL: pixel shuffle, tiles of images and frames of videos through the same picture encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import ItemKind, Layout
from tokensieve.hosts.base import Host
from tokensieve.hosts.registry import register
from tokensieve.hosts.towers import IMAGENET_PIXELS, PictureTower


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
        return PictureTower(
            "encoder.layer",
            "attention",
            class_token=True,
            norm="layernorm_after",
            scale="lambda_2",
            pixels=IMAGENET_PIXELS,
        )

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

    def regroup(self, base: Any, call: EncodeCall, ids: Tensor, arguments: Mapping[str, Any]) -> list[EncodedItem]:
        """Tiles of one image form one run of placeholders; frames of one video follow each other with the same
        words in between.

        Single pictures are joined while the labels in front of them count up. Pictures that a prompt itself
        numbers ("Image-1:", "Image-2:") look the same and count as frames too.
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
        groups: list[tuple[ItemKind, int]] = []
        series = _Series()
        end = 0
        for start in starts:
            before = row[end:start].tolist()
            length = int((~visual[start:]).long().argmax()) or len(row) - start
            end = start + length
            if length == each and series.continues(before):
                groups[-1] = ("video", groups[-1][1] + 1)
                continue
            groups.append(("image", length // each))
            series = _Series(before if length == each else None)
        return groups

    def pool(self, base: Any, call: EncodeCall, item: EncodedItem, raw: Tensor) -> Tensor:
        """Mean over the patches that the pixel shuffle folds into one token."""
        side = int(raw.shape[1] ** 0.5)
        grid = raw.float().view(raw.shape[0], side, side, 1)
        return base.pixel_shuffle(grid, scale_factor=base.config.downsample_ratio).mean(-1).flatten()


class _Series:
    """Recognises labels that count up ("Frame1: ", "Frame2: ") in front of single pictures, from token ids alone.

    The second label shows which token stands before the number and which follow it; from then on the number is
    whatever lies between. The first number coming again begins another video.

    Parameters
    ----------
    first
        Tokens in front of the first picture, or None when it cannot be a frame.
    """

    def __init__(self, first: list[int] | None = None) -> None:
        self.first = first
        self.word: int | None = None
        self.tail: list[int] = []

    def continues(self, before: list[int]) -> bool:
        """Whether the picture behind these tokens belongs to the series."""
        if self.first is None:
            return False
        if self.word is None:
            return self._learn(before)
        number = self._number(before)
        return number is not None and number != self._number(self.first)

    def _learn(self, second: list[int]) -> bool:
        assert self.first is not None
        shared = 0
        while shared < min(len(self.first), len(second)) and self.first[-1 - shared] == second[-1 - shared]:
            shared += 1
        # At least a colon and the start token follow the number, and one word precedes it.
        if shared < 2 or min(len(self.first), len(second)) < shared + 2:
            return False
        if self.first[-shared - 2] != second[-shared - 2]:
            return False
        self.word, self.tail = second[-shared - 2], second[-shared:]
        return True

    def _number(self, before: list[int]) -> list[int] | None:
        head = before[: len(before) - len(self.tail)]
        if self.word not in head or before[len(head) :] != self.tail:
            return None
        place = len(head) - 1 - head[::-1].index(self.word)
        number = head[place + 1 :]
        return number if 1 <= len(number) <= 6 else None
