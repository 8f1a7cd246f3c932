"""Rows, columns and neighbours on the row-major patch grid of a frame."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_and_columns(idx: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of patches in a row-major grid.

    Parameters
    ----------
    idx : Tensor
        Patch indices, any shape.
    width : int
        Patches per row.

    Returns
    -------
    tuple of Tensor
        Rows and columns, same shape as ``idx``.
    """
    return torch.div(idx, width, rounding_mode="floor"), idx % width


def cross_neighbours(idx: Tensor, width: int, total: int) -> Tensor:
    """Each patch with its left, right, upper and lower neighbour, wrapped and clamped.

    Row ends are not respected: the left neighbour of a row's first patch is the last patch of the row above.
    Indices outside the grid become the first or the last patch. This is HiPrune's rule for buffer tokens.

    Parameters
    ----------
    idx : Tensor
        ``[..., A]`` patch indices.
    width : int
        Patches per row.
    total : int
        Patches per frame.

    Returns
    -------
    Tensor
        ``[..., A, 5]``: patch, left, right, up, down; duplicates are possible.
    """
    offsets = torch.tensor([0, -1, 1, -width, width], device=idx.device, dtype=idx.dtype)
    return (idx.unsqueeze(-1) + offsets).clamp_(0, total - 1)


def row_ends(source: Tensor, tokens_per_frame: int, width: int) -> Tensor:
    """Which kept tokens are the last of their grid row, where a row-wise newline embedding follows.

    Rows without any kept token do not occur and therefore get no newline.

    Parameters
    ----------
    source : Tensor
        ``[M]`` frame-major indices ``frame * N + patch`` in output order; tokens of one row must be adjacent.
    tokens_per_frame : int
        N.
    width : int
        Patches per row.

    Returns
    -------
    Tensor
        ``[M]`` bool.
    """
    frame = torch.div(source, tokens_per_frame, rounding_mode="floor")
    row = torch.div(source % tokens_per_frame, width, rounding_mode="floor")
    ends = torch.ones_like(source, dtype=torch.bool)
    ends[:-1] = (frame[1:] != frame[:-1]) | (row[1:] != row[:-1])
    return ends


def insert_after(features: Tensor, ends: Tensor, separator: Tensor) -> Tensor:
    """Insert one separator embedding after every marked token.

    Parameters
    ----------
    features : Tensor
        ``[M, D]``.
    ends : Tensor
        ``[M]`` bool, true where a separator follows.
    separator : Tensor
        ``[D]``.

    Returns
    -------
    Tensor
        ``[M + number of marks, D]``, dtype of ``features``.
    """
    before = torch.cumsum(ends, 0) - ends.long()
    positions = torch.arange(features.shape[0], device=features.device) + before
    out = separator.to(features).expand(features.shape[0] + int(ends.sum()), -1).clone()
    out[positions] = features
    return out
