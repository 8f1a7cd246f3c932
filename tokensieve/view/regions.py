"""Which part of which frame every view of an item shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokensieve.core.layout import Layout

__all__ = ["WHOLE", "Box", "Frames", "Region", "crop", "image_regions", "seen_box", "video_regions"]

Frames = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""Pictures ``[T, H, W, 3]``, or a list of pictures ``[H, W, 3]`` of different sizes."""

_PADDING_GREY = 127


class Box(NamedTuple):
    """A rectangle in shares of a picture's height and width; outside of 0..1 lies padding."""

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0


WHOLE = Box()
"""The whole picture."""


class Region(NamedTuple):
    """What one view shows.

    Attributes
    ----------
    first, last
        Frames that the view covers; the picture of the first is shown.
    box
        Part of it.
    name
        What the view is, when it is no whole frame: ``"base picture"``, ``"mosaic"``, ``"tile 2"``.
    """

    first: int
    last: int
    box: Box = WHOLE
    name: str = ""


def video_regions(views: int, frames: int, box: Box = WHOLE) -> list[Region]:
    """Regions of a video: one view per frame, or per pair of frames as in the Qwen-VL families.

    Parameters
    ----------
    views : int
        Views of the item.
    frames : int
        Frames of the clip, T.
    box : Box
        Part of each frame that the model saw.
    """
    step = max(1, math.ceil(frames / views))
    if views > 1 and (views - 1) * step >= frames:
        starts = [view * frames // views for view in range(views)]
    else:
        starts = [view * step for view in range(views)]
    ends = [start - 1 for start in starts[1:]] + [frames - 1]
    return [Region(start, max(start, end), box) for start, end in zip(starts, ends, strict=True)]


def image_regions(layout: Layout, frame: int, height: int, width: int, box: Box = WHOLE) -> list[Region]:
    """Regions of one image: the whole picture, base picture and mosaic, or tiles and a thumbnail.

    Parameters
    ----------
    layout : Layout
        Geometry of the image.
    frame : int
        Which picture it is.
    height, width : int
        Size of the picture, which decides how tiles lie.
    box : Box
        Part of a picture that went in as one view.
    """
    views = layout.views
    if len(views) == 1:
        return [Region(frame, frame, box)]
    if len(views) == 2 and views[0] != views[1]:
        return [Region(frame, frame, WHOLE, name) for name in ("base picture", "mosaic")]
    tiles = len(views) - 1
    columns = min(
        (count for count in range(1, tiles + 1) if tiles % count == 0),
        key=lambda count: abs(math.log(count / (tiles / count)) - math.log(width / height)),
    )
    rows = tiles // columns
    found = []
    for index in range(tiles):
        row, column = divmod(index, columns)
        part = Box(row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
        found.append(Region(frame, frame, part, f"tile {index + 1} of {tiles}"))
    return [*found, Region(frame, frame, WHOLE, "thumbnail")]


def seen_box(
    height: int,
    width: int,
    processor: Any = None,
    config: Any = None,
    grid: tuple[int, int] | None = None,
) -> Box:
    """Part of a frame that a model sees: processors cut the sides off or pad, towers ignore a rim.

    Parameters
    ----------
    height, width : int
        Size of the frame.
    processor : optional
        The video or image processor; whole frames are assumed without it.
    config : optional
        Configuration of the model. A tower of fixed size reads whole patches only (27 of 14 pixels in 384),
        and a pooling that rounds down leaves out a patch more (LLaVA-Video).
    grid : tuple of int, optional
        Rows and columns of tokens of the frame.
    """
    box = WHOLE
    size, cut = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", None) and cut:
        box = _centre(height, width, size if getattr(processor, "do_resize", True) else None, cut)
    elif _pads_to_square(processor) and height != width:
        down, across = max(0.0, width / height - 1) / 2, max(0.0, height / width - 1) / 2
        box = Box(-down, -across, 1 + down, 1 + across)
    return box if grid is None else _without_rim(box, config, grid)


def _centre(height: int, width: int, size: Any, cut: Any) -> Box:
    """The middle that a centre crop leaves of a resized frame."""
    resized = [float(height), float(width)]
    edge = _entry(size, "shortest_edge")
    if edge:
        resized = [side * edge / min(height, width) for side in resized]
    elif _entry(size, "height") and _entry(size, "width"):
        resized = [_entry(size, "height"), _entry(size, "width")]
    down = (1 - _entry(cut, "height") / resized[0]) / 2
    across = (1 - _entry(cut, "width") / resized[1]) / 2
    return Box(down, across, 1 - down, 1 - across)


def _pads_to_square(processor: Any) -> bool:
    """LLaVA's ``do_pad``, and LLaVA-OneVision's treatment of one among several images."""
    if not hasattr(processor, "pad_to_square"):
        return False
    return bool(getattr(processor, "image_grid_pinpoints", None) or getattr(processor, "do_pad", False))


def _entry(size: Any, name: str) -> float:
    """An entry of a size, which is a mapping or an object; 0 when it is not given."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return float(value or 0)


def _without_rim(box: Box, config: Any, grid: tuple[int, int]) -> Box:
    """The part of a box under whole tokens, for towers whose input has a fixed size."""
    vision = getattr(config, "vision_config", None)
    pixels, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(pixels, int) or not isinstance(patch, int):
        return box
    side = pixels // patch
    shares = [min(tokens * max(1, round(side / tokens)), side) * patch / pixels for tokens in grid]
    return Box(
        box.top,
        box.left,
        box.top + (box.bottom - box.top) * shares[0],
        box.left + (box.right - box.left) * shares[1],
    )


def crop(frames: Frames, region: Region) -> NDArray[np.uint8]:
    """The picture of a view, uint8 [h, w, 3]; padding is grey."""
    frame = np.asarray(frames[region.first])
    height, width = frame.shape[:2]
    top, bottom = round(region.box.top * height), round(region.box.bottom * height)
    left, right = round(region.box.left * width), round(region.box.right * width)
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    if top >= 0 and left >= 0 and bottom <= height and right <= width:
        return frame[top:bottom, left:right]
    canvas = np.full((bottom - top, right - left, 3), _PADDING_GREY, np.uint8)
    inside = frame[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    row, column = max(-top, 0), max(-left, 0)
    canvas[row : row + inside.shape[0], column : column + inside.shape[1]] = inside
    return canvas
