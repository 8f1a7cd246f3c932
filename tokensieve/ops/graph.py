"""Connected components of graphs whose edges are high similarities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DEFAULT_MAX_PAIRS = 4 * 1024 * 1024
"""Similarities looked at in one piece; bounds the memory of the edge lists."""


def join(parent: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Unite the components of two nodes for every edge of a list.

    Parameters
    ----------
    parent : Tensor
        ``[n]`` int64 root of every node; ``arange(n)`` for a graph without edges. A root is the lowest index
        of its component.
    first, second : Tensor
        ``[E]`` int64 ends of the edges.

    Returns
    -------
    Tensor
        ``[n]`` the new roots, again the lowest index of each component.

    Notes
    -----
    All edges act at once: the higher of two roots is hung below the lower one, pointers are shortened to
    roots, and the edges that still join two components go round again. Every round removes all roots that
    have an edge to a lower root, so a handful of rounds is enough.
    """
    parent = parent.clone()
    while first.numel():
        one, other = parent[first], parent[second]
        apart = one != other
        first, second, one, other = first[apart], second[apart], one[apart], other[apart]
        parent.scatter_reduce_(0, torch.maximum(one, other), torch.minimum(one, other), "amin")
        shorter = parent[parent]
        while not torch.equal(shorter, parent):
            parent, shorter = shorter, shorter[shorter]
    return parent


def _linked(units: Tensor, threshold: float, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Graph, lower and higher node of the pairs above the threshold, a bounded number of pairs at a time."""
    graphs, nodes, _ = units.shape
    group, rows = max(1, limit // (nodes * nodes)), max(1, limit // nodes)
    for graph in range(0, graphs, group):
        part = units[graph : graph + group]
        for row in range(0, nodes, rows):
            similarity = part[:, row : row + rows] @ part[:, row:].transpose(1, 2)
            # Rounding may lift a cosine above 1, which would link duplicates at a threshold of 1.
            pairs = (similarity.clamp_max_(1.0) > threshold).triu_(1).nonzero()
            yield pairs[:, 0] + graph, pairs[:, 1] + row, pairs[:, 2] + row


def similarity_components(
    units: Tensor,
    threshold: float,
    *,
    sampled: Tensor | None = None,
    max_pairs: int = DEFAULT_MAX_PAIRS,
) -> tuple[Tensor, Tensor]:
    """Connected components of graphs that link all pairs of vectors with a cosine above a threshold.

    Parameters
    ----------
    units : Tensor
        ``[G, n, D]`` unit vectors; vectors of different graphs are never linked.
    threshold : float
        A pair is linked if its cosine is strictly above it.
    sampled : Tensor, optional
        ``[G, n]`` bool. Only edges with at least one marked end count; all by default.
    max_pairs : int
        Number of similarities handled at once.

    Returns
    -------
    label : Tensor
        ``[G, n]`` int64 component of every vector, counted through all graphs. Components are in ascending
        order of their representatives, hence graph by graph.
    representative : Tensor
        ``[C]`` int64 index ``graph * n + node`` of the vector of each component that has the most links of
        all its vectors (the lowest index among equals), ascending.
    """
    graphs, nodes, _ = units.shape
    total = graphs * nodes
    parent = torch.arange(total, device=units.device)
    degree = torch.zeros_like(parent)
    for graph, low, high in _linked(units, threshold, max_pairs):
        first, second = graph * nodes + low, graph * nodes + high
        degree += torch.bincount(first, minlength=total) + torch.bincount(second, minlength=total)
        if sampled is not None:
            counts = sampled.flatten()[first] | sampled.flatten()[second]
            first, second = first[counts], second[counts]
        parent = join(parent, first, second)
    most = torch.zeros_like(degree).scatter_reduce_(0, parent, degree, "amax")
    index = torch.arange(total, device=units.device)
    candidate = torch.where(degree == most[parent], index, total)
    best = torch.full_like(index, total).scatter_reduce_(0, parent, candidate, "amin")
    representative, label = torch.unique(best[parent], return_inverse=True)
    return label.view(graphs, nodes), representative
