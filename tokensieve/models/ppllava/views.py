"""Geometry of the views that a single image is cut into, and of the tokens that they become.

As in LLaVA-NeXT the first view shows the whole image and the others are the tiles of a larger, padded copy. Every
view is pooled to the same grid; the grids of the tiles are put together again, the rows and columns that show
padding only are cut off, and a newline closes every row that is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from tokensieve.errors import HostError

__all__ = ["image_tokens", "mosaic_slices", "pack_views", "tile_shape", "view_count"]

Size = Sequence[int]


def tile_shape(size: Size, pinpoints: Sequence[Size], side: int) -> tuple[int, int] | None:
    """Rows and columns of tiles for an image.

    Parameters
    ----------
    size : sequence of int
        Height and width of the original image in pixels.
    pinpoints : sequence of (int, int)
        Heights and widths to choose from; empty for no tiles.
    side : int
        Pixels along one side of a view.

    Returns
    -------
    tuple of int or None
        None if the image is not cut.
    """
    if not pinpoints:
        return None
    height, width = select_best_resolution([int(size[0]), int(size[1])], [list(point) for point in pinpoints])
    return height // side, width // side


def view_count(size: Size, pinpoints: Sequence[Size], side: int) -> int:
    """Views of an image: one, or one and its tiles (arguments as for :func:`tile_shape`)."""
    tiles = tile_shape(size, pinpoints, side)
    return 1 if tiles is None else 1 + tiles[0] * tiles[1]


def mosaic_slices(size: Size, rows: int, columns: int) -> tuple[slice, slice]:
    """Rows and columns of a mosaic that show the image and not its padding.

    Parameters
    ----------
    size : sequence of int
        Height and width of the original image.
    rows, columns : int
        Of the mosaic of pooled tiles, padding included.

    Returns
    -------
    tuple of slice
        What to keep; the same amount is cut off on both sides.
    """
    height, width = int(size[0]), int(size[1])
    # Rounding to seven places undoes float errors such as 15.999999999, as LLaVA-NeXT does.
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(cut, rows - cut), slice(0, columns)
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(cut, columns - cut)


def image_tokens(size: Size, tiles: tuple[int, int] | None, grid: tuple[int, int]) -> int:
    """Tokens of a single image, newlines included.

    Parameters
    ----------
    size : sequence of int
        Height and width of the original image.
    tiles : tuple of int, optional
        From :func:`tile_shape`.
    grid : tuple of int
        Rows and columns of a pooled view.

    Returns
    -------
    int
        With 8 x 8 grids 65 for one view, and at most 64 + 272 for 2 x 2 tiles.
    """
    base = grid[0] * grid[1]
    if tiles is None:
        return base + 1
    rows, columns = tiles[0] * grid[0], tiles[1] * grid[1]
    kept_rows, kept_columns = mosaic_slices(size, rows, columns)
    height = kept_rows.stop - kept_rows.start
    return base + height * (kept_columns.stop - kept_columns.start + 1)


def pack_views(views: Tensor, size: Size, tiles: tuple[int, int] | None, newline: Tensor) -> Tensor:
    """Tokens of a single image in reading order.

    Parameters
    ----------
    views : Tensor
        ``[P, h', w', D]``: pooled views, the whole image first.
    size : sequence of int
        Height and width of the original image.
    tiles : tuple of int, optional
        Rows and columns of tiles, ``P = 1 + rows * columns``; None for a single view.
    newline : Tensor
        ``[D]``.

    Returns
    -------
    Tensor
        ``[image_tokens(...), D]``.

    Raises
    ------
    HostError
        If the number of views does not match.
    """
    expected = 1 if tiles is None else 1 + tiles[0] * tiles[1]
    if views.shape[0] != expected:
        raise HostError(f"An image has {views.shape[0]} views where its size asks for {expected}; process it again.")
    newline = newline.to(views)
    base = views[0].flatten(0, 1)
    if tiles is None:
        return torch.cat([base, newline[None]])
    mosaic = views[1:].unflatten(0, tiles).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    mosaic = mosaic[mosaic_slices(size, mosaic.shape[0], mosaic.shape[1])]
    closed = torch.cat([mosaic, newline.expand(mosaic.shape[0], 1, -1)], dim=1)
    return torch.cat([base, closed.flatten(0, 1)])
