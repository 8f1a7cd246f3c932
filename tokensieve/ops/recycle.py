"""Recycling of dropped tokens: the best of them are clustered around density peaks and averaged (SparseVLM)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.cluster import scaled_distances
from tokensieve.ops.merge import mean_merge
from tokensieve.ops.similarity import as_float32

NOISE = 1e-6
"""Weight of the uniform numbers in the density."""
COUNT_EPSILON = 1e-6
"""Added to the number of members in the mean, as the released code does."""


class Recycled(NamedTuple):
    """Merged tokens.

    Attributes
    ----------
    features : Tensor
        ``[c, D]``, in the order of the centres.
    centres : Tensor
        ``[c]`` int64 centre of every cluster, by falling score.
    assignment : Tensor
        ``[n]`` int64 cluster of every token.
    """

    features: Tensor
    centres: Tensor
    assignment: Tensor


def recycle_counts(dropped: int, share: float = 0.3, cluster_share: float = 0.1) -> tuple[int, int]:
    """How many dropped tokens are candidates, and into how many tokens they are merged.

    Parameters
    ----------
    dropped : int
        Number of dropped tokens d.
    share, cluster_share : float
        tau and theta of the paper.

    Returns
    -------
    candidates, clusters : int
        ``int(tau d) + 1`` and ``int(theta candidates) + 1``, neither above d.
    """
    candidates = min(int(share * dropped) + 1, dropped)
    return candidates, min(int(cluster_share * candidates) + 1, candidates)


def peak_clusters(features: Tensor, clusters: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster centres by falling score, and the nearest centre of every vector.

    Density and score are those of `tokensieve.ops.cluster.density_peaks` with as many neighbours as clusters;
    here the order of the centres matters, and the published noise can be given.

    Parameters
    ----------
    features : Tensor
        ``[n, D]``.
    clusters : int
        Number of centres c, from 1 to n.
    noise : Tensor, optional
        ``[n]`` numbers in [0, 1) that the released code draws for the density. Without it no number is added
        and of equal densities the lower index counts as denser. With two clusters mutual neighbours have equal
        density, so that the released code's result hangs on its noise.

    Returns
    -------
    centres : Tensor
        ``[c]`` int64.
    assignment : Tensor
        ``[n]`` int64 places in ``centres``; a centre belongs to itself.

    Raises
    ------
    MethodError
        If ``clusters`` is outside 1..n or the noise has another length.
    """
    count = features.shape[0]
    if not 1 <= clusters <= count:
        raise MethodError(f"cannot form {clusters} clusters out of {count} tokens; ask for 1 to {count}.")
    if noise is not None and noise.shape != (count,):
        raise MethodError(f"the noise has shape {tuple(noise.shape)}, but there are {count} candidates.")
    distances = scaled_distances(features.unsqueeze(0))[0]
    nearest = distances.topk(clusters, dim=-1, largest=False).values
    density = torch.exp(-nearest.square().mean(dim=-1))
    if noise is not None:
        density = density + NOISE * noise.to(density)
        denser = density.unsqueeze(0) > density.unsqueeze(1)
    else:
        rank = torch.empty(count, dtype=torch.int64, device=features.device)
        order = density.sort(descending=True, stable=True).indices
        rank[order] = torch.arange(count, device=features.device)
        denser = rank.unsqueeze(0) < rank.unsqueeze(1)
    delta = torch.where(denser, distances, distances.amax()).amin(dim=-1)
    centres = (density * delta).sort(descending=True, stable=True).indices[:clusters]
    assignment = distances[:, centres].argmin(dim=-1)
    assignment[centres] = torch.arange(clusters, device=features.device)
    return centres, assignment


def recycle(features: Tensor, clusters: int, noise: Tensor | None = None) -> Recycled:
    """Merge tokens into the means of their clusters.

    Parameters
    ----------
    features : Tensor
        ``[n, D]`` candidates.
    clusters, noise
        See `peak_clusters`.

    Returns
    -------
    Recycled
        Merged tokens ``sum / (members + 1e-6)`` in the dtype of ``features``.
    """
    work = as_float32(features)
    centres, assignment = peak_clusters(work, clusters, noise)
    members = torch.bincount(assignment, minlength=clusters).to(work.dtype)
    means = mean_merge(work, assignment, clusters) * (members / (members + COUNT_EPSILON)).unsqueeze(-1)
    return Recycled(means.to(features.dtype), centres, assignment)
