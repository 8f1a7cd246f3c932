"""Deterministic selection: top-k here, farthest points from their own module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokensieve.ops.diversity import farthest_point

__all__ = ["farthest_point", "top_indices", "top_mask"]


def _ranked(scores: Tensor, largest: bool) -> Tensor:
    """Indices of the last axis from best to worst, lowest index first on ties, NaN last."""
    worst = float("-inf") if largest else float("inf")
    clean = torch.nan_to_num(scores, nan=worst, posinf=float("inf"), neginf=float("-inf"))
    return clean.sort(dim=-1, descending=largest, stable=True).indices


def top_indices(
    scores: Tensor, count: int, largest: bool = True, order: Literal["ascending", "rank"] = "ascending"
) -> Tensor:
    """Indices of the best scores of the last axis.

    Parameters
    ----------
    scores : Tensor
        ``[..., n]``. NaN ranks last.
    count : int
        Number of indices, limited to ``0..n``.
    largest : bool
        Whether large or small scores are best.
    order : {"ascending", "rank"}
        Indices in ascending order, or from best to worst.

    Returns
    -------
    Tensor
        ``[..., count]`` int64. Among equal scores the lowest index comes first.
    """
    chosen = _ranked(scores, largest)[..., : max(count, 0)]
    return chosen if order == "rank" else chosen.sort(dim=-1).values


def top_mask(scores: Tensor, counts: Tensor | int, largest: bool = True) -> Tensor:
    """Mark the best scores of every row, with a number of its own for each row.

    Parameters
    ----------
    scores : Tensor
        ``[..., n]``. NaN ranks last.
    counts : Tensor or int
        ``[...]`` int64 number to mark in each row, or one number for all.
    largest : bool
        Whether large or small scores are best.

    Returns
    -------
    Tensor
        ``[..., n]`` bool. Among equal scores the lowest index comes first.
    """
    ranked = _ranked(scores, largest)
    limit = torch.as_tensor(counts, device=scores.device).unsqueeze(-1)
    inside = (torch.arange(scores.shape[-1], device=scores.device) < limit).expand_as(ranked)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked, inside)
