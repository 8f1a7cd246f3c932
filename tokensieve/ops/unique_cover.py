"""Tokens of a frame chosen from the most to the least unique, each dropping its likes (UniComp)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.ops.cover import greedy_cover
from tokensieve.ops.similarity import unit_vectors

TOKEN_RADIUS = 0.2
_MAX_PAIRS = 16 * 1024 * 1024
_TIE_GRID = 1e6
"""Mean similarities are compared in steps of 1e-6, so that equal tokens tie on every processor."""


def cover_tokens(keys: Tensor, radius: float = TOKEN_RADIUS) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy choice of tokens from the most to the least unique, each dropping what lies near it (step 4).

    Parameters
    ----------
    keys : Tensor
        ``[g, N, d]`` vectors that similarity is measured between.
    radius : float
        Uniqueness below which two tokens are near each other.

    Returns
    -------
    near : Tensor
        ``[g, N, N]`` bool.
    order : Tensor
        ``[g, N]`` int64 tokens by ascending mean similarity, lowest index first on ties.
    chosen : Tensor
        ``[g, N]`` bool.
    """
    tokens = keys.shape[1]
    parts = []
    for block in keys.split(max(1, _MAX_PAIRS // (tokens * tokens))):
        units = unit_vectors(block)
        similarity = units @ units.transpose(1, 2)
        typical = torch.round(similarity.mean(dim=2) * _TIE_GRID)
        order = typical.sort(dim=1, stable=True).indices
        near = similarity.neg_().add_(1).clamp_min_(0) < radius
        near.diagonal(dim1=1, dim2=2).fill_(radius > 0)
        parts.append((near, order, greedy_cover(near, order)))
    nears, orders, chosens = zip(*parts, strict=True)
    return torch.cat(nears), torch.cat(orders), torch.cat(chosens)


def truncate(chosen: Tensor, order: Tensor, budgets: Tensor) -> Tensor:
    """Cut the chosen tokens of every frame to its budget, the most unique ones first (step 5).

    Parameters
    ----------
    chosen, order : Tensor
        ``[g, N]``, see ``cover_tokens``.
    budgets : Tensor
        ``[g]`` int64. Places that some frames leave unused go in equal parts to the others.

    Returns
    -------
    Tensor
        ``[g, N]`` bool.
    """
    counts, limit = chosen.sum(dim=1).cpu(), budgets.clone()
    if int(counts.sum()) > int(limit.sum()):
        full = counts >= limit
        slack = int((limit - counts)[~full].sum())
        limit[full] += slack // max(1, int(full.sum()))
    ranked = chosen.gather(1, order)
    stays = ranked & (ranked.cumsum(dim=1) <= limit.to(chosen.device).unsqueeze(1))
    return torch.zeros_like(chosen).scatter_(1, order, stays)
