"""Painting what became of the patches onto a frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokensieve.view.cells import Cells, CellState

__all__ = ["VEIL", "VEIL_LEFT", "fit", "group_colours", "overlay"]

VEIL = (44, 48, 56)
"""Slate that dropped patches fade into; lighter than night scenes, darker than daylight."""

VEIL_LEFT = (88, 80, 122)
"""Violet of patches that entered the LLM and left inside of it."""

_FADE = 0.72
_FADE_LEFT = 0.58
_TINT = 0.46
_GROUND, _HATCH = 100.0, 26.0
_GOLDEN = 0.6180339887498949
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def group_colours(groups: NDArray[np.int64]) -> NDArray[np.float32]:
    """Colours of merge groups [..., 3] in 0..255; neighbouring numbers get clearly different hues."""
    hue = np.mod(groups * _GOLDEN, 1.0) * 6.0
    # Softened hues, so that the pictures under them stay readable.
    ramps = np.abs(hue[..., None] - np.array([3.0, 2.0, 4.0])) * np.array([1.0, -1.0, -1.0])
    pure = np.clip(ramps + np.array([-1.0, 2.0, 2.0]), 0.0, 1.0)
    return (255.0 * (0.28 + 0.62 * pure)).astype(np.float32)


def overlay(frame: NDArray[np.uint8], cells: Cells) -> NDArray[np.uint8]:
    """A frame with its patches marked.

    Kept patches are shown as they are. Patches folded into a kept token are tinted in the colour of that
    token, and a line in the same colour runs around all patches of it. Dropped patches lose their colour and
    fade into slate, those that left inside the LLM into violet; patches that the model's processor left out
    are hatched. A fine light line separates what goes on from what does not.

    Parameters
    ----------
    frame : ndarray [H, W, 3], uint8
        The part of the picture that the grid covers, at the size at which it is to be shown.
    cells : Cells
        Grid of patches; may be of any size up to H x W.

    Returns
    -------
    ndarray [H, W, 3], uint8
        A new picture; edges of patches lie on whole pixels.
    """
    height, width = frame.shape[:2]
    rows, columns = cells.state.shape
    row = (np.arange(height) * rows // height)[:, None]
    column = np.arange(width) * columns // width
    colour, grey, veil = _weights(cells)
    picture = frame.astype(np.float32)
    luma = (picture @ _LUMA)[..., None]
    result = colour[row, column] * picture + grey[row, column] * luma + veil[row, column]
    state, group = cells.state[row, column], cells.group[row, column]
    if (cells.state == CellState.ABSENT).any():
        stripe = (np.arange(height)[:, None] + np.arange(width)) // 4 % 2 == 1
        result[stripe & (state == CellState.ABSENT)] += _HATCH
    goes_on = state <= CellState.MERGED
    rim = _rim(goes_on, 1) & goes_on & (group < 0)
    result[rim] = 0.55 * result[rim] + 0.45 * 255.0
    if (cells.group >= 0).any():
        outline = _rim(group, max(1, min(height // rows, width // columns) // 14)) & (group >= 0) & goes_on
        result[outline] = group_colours(group[outline])
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def _weights(cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Weight of a patch's colours, of its brightness, and what is added to them, [rows, columns, 1 or 3]."""
    state = cells.state[..., None]
    tinted = (state == CellState.MERGED) & (cells.group[..., None] >= 0)
    dropped, left, absent = (state == one for one in (CellState.DROPPED, CellState.LEFT, CellState.ABSENT))
    colour = 1.0 - _TINT * tinted - 1.0 * (dropped | left | absent)
    grey = (1 - _FADE) * dropped + (1 - _FADE_LEFT) * left + 0.15 * absent
    veil = _FADE * dropped * np.array(VEIL) + _FADE_LEFT * left * np.array(VEIL_LEFT)
    veil = veil + absent * _GROUND + _TINT * tinted * group_colours(cells.group)
    return colour.astype(np.float32), grey.astype(np.float32), veil.astype(np.float32)


def _rim(values: NDArray[np.generic], thick: int) -> NDArray[np.bool_]:
    """Pixels that lie up to ``thick`` pixels from another value; the edge of the picture is none."""
    found = np.zeros(values.shape, bool)
    for step in range(1, thick + 1):
        down = values[step:] != values[:-step]
        across = values[:, step:] != values[:, :-step]
        found[step:] |= down
        found[:-step] |= down
        found[:, step:] |= across
        found[:, :-step] |= across
    return found


def fit(picture: NDArray[np.uint8], side: int, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a picture to a longer side of ``side`` pixels, and to 4 pixels a patch at least.

    Parameters
    ----------
    picture : ndarray [h, w, 3], uint8
        Picture of a view.
    side : int
        Longer side of the result in pixels.
    grid : tuple of int
        Rows and columns of patches.
    """
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(4 * grid[1], round(width * scale)), max(4 * grid[0], round(height * scale)))
    if size == (width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
