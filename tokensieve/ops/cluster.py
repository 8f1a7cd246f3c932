"""Density-peak clustering with k nearest neighbours (DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError


def scaled_distances(features: Tensor) -> Tensor:
    """Euclidean distances divided by the square root of the dimension.

    Parameters
    ----------
    features : Tensor
        ``[B, n, D]``.

    Returns
    -------
    Tensor
        ``[B, n, n]`` float32, symmetric with an exactly zero diagonal.

    Notes
    -----
    The Gram matrix is taken in float64 around the mean: the usual float32 form loses the distances of
    near-duplicates, which are exactly what redundant video is made of.
    """
    # A processor writes one group after the other: what is in float64 then stays in its cache.
    parts = features.split(1) if features.device.type == "cpu" and features.shape[0] > 1 else (features,)
    return torch.cat([_scaled_distances(part) for part in parts])


def _scaled_distances(features: Tensor) -> Tensor:
    centred = features.double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    gram = centred @ centred.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    distances = (square.unsqueeze(1) + square.unsqueeze(2) - gram - gram.transpose(1, 2)).clamp_min_(0)
    distances = distances.div_(features.shape[-1]).sqrt_().float()
    distances.diagonal(dim1=1, dim2=2).zero_()
    return distances


def density_peaks(features: Tensor, clusters: int, neighbours: int = 7) -> tuple[Tensor, Tensor]:
    """Cluster vectors around their density peaks.

    The density of a vector is ``exp(-mean of its k smallest squared distances)``, itself included, with
    distances divided by ``sqrt(D)``; its delta is the distance to the nearest denser vector, or the largest
    distance of all for the densest. The vectors with the largest ``density * delta`` become centres and
    every other vector joins its nearest centre. Equal densities count as denser at the lower index, in
    place of the random noise that published implementations add, so that the result is deterministic.

    Parameters
    ----------
    features : Tensor
        ``[B, n, D]`` or ``[n, D]``.
    clusters : int
        Number of centres c, from 1 to n.
    neighbours : int
        k of the density, limited by ``clusters`` (rule of HoliTom) and therefore by n.

    Returns
    -------
    centres : Tensor
        ``[B, c]`` (or ``[c]``) int64, ascending.
    assignment : Tensor
        ``[B, n]`` (or ``[n]``) int64: position in ``centres`` of the cluster of each vector.

    Raises
    ------
    MethodError
        If ``clusters`` is outside 1..n.
    """
    if features.dim() == 2:
        centres, assignment = density_peaks(features.unsqueeze(0), clusters, neighbours)
        return centres[0], assignment[0]
    batch, count, _ = features.shape
    if not 1 <= clusters <= count:
        raise MethodError(f"cannot form {clusters} clusters out of {count} tokens; ask for 1 to {count}.")
    distances = scaled_distances(features)
    nearest = distances.topk(min(neighbours, clusters), dim=-1, largest=False).values
    density = torch.exp(-nearest.square().mean(dim=-1))
    rank = torch.empty(batch, count, dtype=torch.int64, device=features.device)
    order = density.sort(dim=-1, descending=True, stable=True).indices
    positions = torch.arange(count, device=features.device).expand(batch, -1)
    rank.scatter_(1, order, positions)
    denser = rank.unsqueeze(1) < rank.unsqueeze(2)
    farthest = distances.flatten(1).amax(dim=1)
    delta = torch.where(denser, distances, farthest.view(-1, 1, 1)).amin(dim=-1)
    peaks = (density * delta).sort(dim=-1, descending=True, stable=True).indices[:, :clusters]
    centres = peaks.sort(dim=-1).values
    to_centres = distances.gather(2, centres.unsqueeze(1).expand(-1, count, -1))
    assignment = to_centres.argmin(dim=-1)
    # A centre belongs to itself even when it coincides with another centre.
    assignment.scatter_(1, centres, torch.arange(clusters, device=features.device).expand(batch, -1))
    return centres, assignment
