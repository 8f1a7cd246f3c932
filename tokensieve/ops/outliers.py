"""Local outlier factor of scalar values, in closed form over the sorted line."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError

OUTLIER_FACTOR = 1.5
_EPSILON = 1e-10
"""Added to the mean reachability, so that the density of values that repeat stays finite."""


def local_outlier_factor(values: Tensor, neighbours: int) -> Tensor:
    """How much sparser the surroundings of every value are than those of its nearest neighbours.

    Parameters
    ----------
    values : Tensor
        ``[n]``, at least 2.
    neighbours : int
        k, limited to n - 1. On a line the k nearest values lie within k places of the sorted order.

    Returns
    -------
    Tensor
        ``[n]`` float64, about 1 inside a cluster and large for outliers.

    Raises
    ------
    MethodError
        If there are fewer than two values, or k is below 1.
    """
    count = values.numel()
    if values.dim() != 1 or count < 2 or neighbours < 1:
        raise MethodError(
            f"outlier factors need at least two values in one row and one neighbour, but the shape is "
            f"{tuple(values.shape)} and there are {neighbours} neighbours."
        )
    k = min(neighbours, count - 1)
    line, order = values.double().sort(stable=True)
    offsets = torch.cat((torch.arange(-k, 0), torch.arange(1, k + 1))).to(values.device)
    places = torch.arange(count, device=values.device).unsqueeze(1) + offsets
    inside = (places >= 0) & (places < count)
    places = places.clamp(0, count - 1)
    gaps = (line[places] - line.unsqueeze(1)).abs().masked_fill(~inside, float("inf"))
    distances, chosen = gaps.topk(k, dim=1, largest=False, sorted=True)
    nearest = places.gather(1, chosen)
    reach = torch.maximum(distances, distances[:, -1][nearest])
    density = 1 / (reach.mean(dim=1) + _EPSILON)
    factor = torch.empty_like(line)
    factor[order] = (density[nearest] / density.unsqueeze(1)).mean(dim=1)
    return factor


def outlier_ratio(values: Tensor, neighbours: int, limit: float = OUTLIER_FACTOR) -> float:
    """Share of the values whose local outlier factor exceeds the limit.

    Parameters
    ----------
    values : Tensor
        ``[n]``; fewer than two values have no outliers.
    neighbours : int
        k of `local_outlier_factor`.
    limit : float
        1.5 by common usage.

    Returns
    -------
    float
        Count divided by n.

    Raises
    ------
    MethodError
        If ``neighbours`` is below 1 or the values are no row.
    """
    if values.dim() == 1 and values.numel() < 2:
        return 0.0
    return int((local_outlier_factor(values, neighbours) > limit).sum()) / values.numel()
