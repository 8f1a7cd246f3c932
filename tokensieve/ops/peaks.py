"""Density-peak clustering of many groups of different size at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.cluster import scaled_distances

DEFAULT_MAX_BYTES = 256 * 1024 * 1024
_BYTES_PER_PAIR = 40
"""Bytes that live at the same time for every pair of tokens: Gram matrix, distances, masks."""
_ZERO = -1e30
"""Stands for the logarithm of zero, above that of members that do not exist."""


class PeakClusters(NamedTuple):
    """Clusters of a batch of groups.

    Attributes
    ----------
    centres : Tensor
        ``[B, c]`` int64 members that became centres, best first; c is the largest number of clusters of a
        group, and the last columns of a group with fewer clusters mean nothing.
    assignment : Tensor
        ``[B, n]`` int64 column of ``centres`` for every member; meaningless outside ``valid``.
    """

    centres: Tensor
    assignment: Tensor


def peak_scores(
    distances: Tensor, neighbours: int | Tensor, valid: Tensor | None = None, *, strict: bool = False
) -> Tensor:
    """Logarithm of density times distance to the nearest denser member, by which centres are chosen.

    The density of a member is ``exp(-mean of its k smallest squared distances)``, itself included; delta is the
    distance to the nearest denser member, or the largest distance of the group for the densest one.

    Parameters
    ----------
    distances : Tensor
        ``[B, n, n]`` symmetric, zero on the diagonal.
    neighbours : int or Tensor
        k, one for all or ``[B]``; limited by the size of a group.
    valid : Tensor, optional
        ``[B, n]`` bool, the members of every group; all by default.
    strict : bool
        Members of equal density do not count as denser than each other, so that both of two duplicates may
        become centres. By default the lower index counts as the denser one, in place of the random noise that
        published implementations add.

    Returns
    -------
    Tensor
        ``[B, n]`` float64; about -1e30 where the distance is zero, ``-inf`` outside ``valid``.
    """
    batch, count, _ = distances.shape
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=distances.device)
    sizes = valid.sum(dim=1)
    limit = torch.minimum(torch.as_tensor(neighbours, device=distances.device).expand(batch), sizes).clamp_min(1)
    masked = distances.masked_fill(~valid.unsqueeze(1), float("inf"))
    nearest = masked.topk(min(int(limit.max()), count), dim=-1, largest=False).values.double()
    used = torch.arange(nearest.shape[-1], device=distances.device) < limit.view(-1, 1, 1)
    # Logarithms, because the densities of tokens with large norms would all round to zero.
    density = -nearest.square().masked_fill(~used, 0).sum(dim=-1) / limit.unsqueeze(1)
    density = density.masked_fill(~valid, float("-inf"))
    if strict:
        denser = density.unsqueeze(1) > density.unsqueeze(2)
    else:
        rank = torch.empty(batch, count, dtype=torch.int64, device=distances.device)
        order = density.sort(dim=-1, descending=True, stable=True).indices
        rank.scatter_(1, order, torch.arange(count, device=distances.device).expand(batch, -1))
        denser = rank.unsqueeze(1) < rank.unsqueeze(2)
    pairs = valid.unsqueeze(1) & valid.unsqueeze(2)
    farthest = distances.masked_fill(~pairs, 0).flatten(1).amax(dim=1)
    delta = torch.where(denser, distances, farthest.view(-1, 1, 1)).amin(dim=-1)
    return (density + torch.where(delta > 0, delta.double().log(), _ZERO)).masked_fill(~valid, float("-inf"))


def peak_clusters(
    features: Tensor,
    clusters: int | Tensor,
    neighbours: int | Tensor,
    valid: Tensor | None = None,
    *,
    strict: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> PeakClusters:
    """Cluster every group around its density peaks; each member joins the nearest centre.

    Parameters
    ----------
    features : Tensor
        ``[B, n, D]``; distances are divided by ``sqrt(D)``.
    clusters : int or Tensor
        Number of centres, one for all or ``[B]``, each from 1 to the size of the group.
    neighbours : int or Tensor
        k of the density, one for all or ``[B]``.
    valid : Tensor, optional
        ``[B, n]`` bool, the members of every group; all by default.
    strict : bool
        See `peak_scores`.
    max_bytes : int
        Bound of the memory for the pairs of the groups that are handled together (at least one group is).

    Returns
    -------
    PeakClusters
        Centres by rank (the lower index wins ties) and the assignment of the members; of equally near centres
        the better one is taken, and a centre belongs to itself.

    Raises
    ------
    MethodError
        If a group is to have no cluster, or more clusters than members.
    """
    batch, count, _ = features.shape
    device = features.device
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=device)
    wanted = torch.as_tensor(clusters, device=device).expand(batch)
    nearby = torch.as_tensor(neighbours, device=device).expand(batch)
    if bool(((wanted < 1) | (wanted > valid.sum(dim=1))).any()):
        raise MethodError(
            f"cannot form {wanted.tolist()} clusters of groups of {valid.sum(dim=1).tolist()} tokens; ask for 1 to "
            "the size of each group."
        )
    step = max(1, max_bytes // (_BYTES_PER_PAIR * count * count))
    centres = torch.zeros(batch, int(wanted.max()), dtype=torch.int64, device=device)
    assignment = torch.zeros(batch, count, dtype=torch.int64, device=device)
    columns = torch.arange(centres.shape[1], device=device)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        distances = scaled_distances(features[part])
        scores = peak_scores(distances, nearby[part], valid[part], strict=strict)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : centres.shape[1]]
        exists = columns < wanted[part].unsqueeze(1)
        to_centres = distances.gather(2, best.unsqueeze(1).expand(-1, count, -1))
        joined = to_centres.masked_fill_(~exists.unsqueeze(1), float("inf")).argmin(dim=-1)
        # A centre belongs to itself even when it coincides with another centre.
        own = torch.full((best.shape[0], count), -1, dtype=torch.int64, device=device)
        own.scatter_(1, best, torch.where(exists, columns, -1))
        centres[part], assignment[part] = best, torch.where(own >= 0, own, joined)
    return PeakClusters(centres, assignment)


def ragged_clusters(
    features: Tensor,
    sizes: Tensor,
    clusters: Tensor,
    neighbours: int = 7,
    *,
    strict: bool = False,
    groups_per_block: int = 16,
) -> tuple[Tensor, Tensor]:
    """Cluster groups of different size that stand one after the other.

    Parameters
    ----------
    features : Tensor
        ``[S, D]`` members of all groups.
    sizes : Tensor
        ``[G]`` int64 number of members, summing to S.
    clusters : Tensor
        ``[G]`` int64 number of clusters, from 1 to the size (0 for empty groups). A group with as many clusters as
        members stays as it is.
    neighbours : int
        k of the density, limited by the number of clusters.
    strict : bool
        See `peak_scores`.
    groups_per_block : int
        Groups that are padded to one size and handled together.

    Returns
    -------
    label : Tensor
        ``[S]`` int64 cluster of every member, counted over all groups.
    centres : Tensor
        ``[C]`` int64 member at the centre of every cluster.

    Raises
    ------
    MethodError
        See `peak_clusters`.
    """
    device = features.device
    starts, firsts = sizes.cumsum(0) - sizes, clusters.cumsum(0) - clusters
    group = torch.arange(sizes.numel(), device=device).repeat_interleave(sizes)
    label = firsts[group] + torch.arange(group.numel(), device=device) - starts[group]
    centres = torch.zeros(int(clusters.sum()), dtype=torch.int64, device=device)
    unchanged = (clusters == sizes)[group]
    centres[label[unchanged]] = unchanged.nonzero()[:, 0]
    changed = (clusters != sizes).nonzero()[:, 0]
    for part in changed.split(groups_per_block) if changed.numel() else ():
        wanted = clusters[part]
        columns = torch.arange(int(sizes[part].max()), device=device)
        valid = columns < sizes[part].unsqueeze(1)
        members = (starts[part].unsqueeze(1) + columns).clamp_max(group.numel() - 1)
        found = peak_clusters(features[members], wanted, wanted.clamp_max(neighbours), valid, strict=strict)
        label[members[valid]] = (firsts[part].unsqueeze(1) + found.assignment)[valid]
        places = torch.arange(found.centres.shape[1], device=device)
        exists = places < wanted.unsqueeze(1)
        centres[(firsts[part].unsqueeze(1) + places)[exists]] = members.gather(1, found.centres)[exists]
    return label, centres
