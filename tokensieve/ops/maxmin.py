"""Greedy max-min selection inside many small groups, on distances that need not be symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError


def greedy_max_min(distances: Tensor, count: int, *, exclude: bool = True) -> Tensor:
    """Choose members one by one, each with the largest smallest distance from those already chosen.

    Entry ``[i, j]`` is the distance of candidate j from a chosen member i. The first choice is the column whose
    second smallest entry is largest: the smallest one is normally its own diagonal.

    Parameters
    ----------
    distances : Tensor
        ``[B, n, n]``.
    count : int
        Number of members to choose in every group, limited to n.
    exclude : bool
        Chosen members cannot be chosen again. Without it a member repeats where all other candidates have
        negative distances, as in one released implementation.

    Returns
    -------
    Tensor
        ``[B, count]`` int64 in the order of the choice; the lowest index wins ties.

    Raises
    ------
    MethodError
        If the distances are not ``[B, n, n]``.
    """
    if distances.dim() != 3 or distances.shape[1] != distances.shape[2]:
        raise MethodError(f"max-min selection needs distances [B, n, n], but the shape is {tuple(distances.shape)}.")
    batch, total, _ = distances.shape
    count = min(max(count, 0), total)
    if count == 0 or batch == 0:
        return torch.zeros(batch, count, dtype=torch.int64, device=distances.device)
    groups = torch.arange(batch, device=distances.device)
    second = min(2, total)
    chosen = distances.topk(second, dim=1, largest=False).values[:, second - 1].argmax(dim=1)
    order = [chosen]
    nearest = torch.full((batch, total), float("inf"), dtype=distances.dtype, device=distances.device)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distances[groups, chosen])
        if exclude:
            nearest[groups, chosen] = float("-inf")
        chosen = nearest.argmax(dim=1)
        order.append(chosen)
    return torch.stack(order, dim=1)
