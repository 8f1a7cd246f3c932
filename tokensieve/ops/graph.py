"""Connected components of graphs whose edges are high similarities."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def _tiles(graphs: int, nodes: int, limit: int) -> Iterator[tuple[slice, int, int]]:
    """Graphs, first row and last row of pieces that hold a bounded number of pairs."""
    group, rows = max(1, limit // (nodes * nodes)), max(1, limit // nodes)
    for graph in range(0, graphs, group):
        for row in range(0, nodes, rows):
            yield slice(graph, graph + group), row, min(nodes, row + rows)


def cosine_matrix(units: Tensor, max_pairs: int = DEFAULT_MAX_PAIRS) -> Tensor:
    """All cosines of some unit vectors, at half the products of a plain matrix product.

    Parameters
    ----------
    units : Tensor
        ``[n, D]`` unit vectors.
    max_pairs : int
        Number of cosines computed at once.

    Returns
    -------
    Tensor
        ``[n, n]``, exactly symmetric, at most 1.
    """
    total = units.shape[0]
    cosine = units.new_empty(total, total)
    for _, start, end in _tiles(1, total, max_pairs):
        cosine[start:end, start:] = units[start:end] @ units[start:].T
        corner = cosine[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        cosine[end:, start:end] = cosine[start:end, end:].T
    return cosine.clamp_max_(1.0)


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
        Number of cosines looked at in one piece.

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

    def tile(graph: slice, start: int, end: int) -> Tensor:
        # Rounding may lift a cosine above 1, which would link duplicates at a threshold of 1.
        return (units[graph, start:end] @ units[graph, start:].transpose(1, 2)).clamp_max_(1.0)

    return tiled_components(tile, graphs, nodes, threshold, units.device, sampled=sampled, max_pairs=max_pairs)


def matrix_components(
    similarity: Tensor, threshold: float, *, max_pairs: int = DEFAULT_MAX_PAIRS
) -> tuple[Tensor, Tensor]:
    """Like ``similarity_components``, for similarities that are already there.

    Parameters
    ----------
    similarity : Tensor
        ``[G, n, n]`` symmetric.
    threshold : float
        A pair is linked if its similarity is strictly above it.
    max_pairs : int
        Number of similarities looked at in one piece.

    Returns
    -------
    label, representative : Tensor
        See ``similarity_components``.
    """
    graphs, nodes, _ = similarity.shape

    def tile(graph: slice, start: int, end: int) -> Tensor:
        return similarity[graph, start:end, start:]

    return tiled_components(tile, graphs, nodes, threshold, similarity.device, max_pairs=max_pairs)


def tiled_components(
    tile: Callable[[slice, int, int], Tensor],
    graphs: int,
    nodes: int,
    threshold: float,
    device: torch.device,
    *,
    sampled: Tensor | None = None,
    max_pairs: int = DEFAULT_MAX_PAIRS,
) -> tuple[Tensor, Tensor]:
    """Like ``similarity_components``, for similarities that are handed out piece by piece.

    Parameters
    ----------
    tile : callable
        From a slice of graphs, a first row and a row behind the last one to similarities ``[g, rows, n - first]`` of
        these rows with the columns from the first row on.
    graphs, nodes : int
        G and n.
    threshold, sampled, max_pairs
        As there.
    device : torch.device
        Where the similarities are.

    Returns
    -------
    label, representative : Tensor
        See ``similarity_components``.
    """
    total = graphs * nodes
    parent = torch.arange(total, device=device)
    degree = torch.zeros_like(parent)
    for graph, start, end in _tiles(graphs, nodes, max_pairs):
        pairs = (tile(graph, start, end) > threshold).triu_(1).nonzero()
        first = (pairs[:, 0] + graph.start) * nodes + start + pairs[:, 1]
        second = first - pairs[:, 1] + pairs[:, 2]
        degree += torch.bincount(first, minlength=total) + torch.bincount(second, minlength=total)
        if sampled is not None:
            counts = sampled.flatten()[first] | sampled.flatten()[second]
            first, second = first[counts], second[counts]
        parent = join(parent, first, second)
    most = torch.zeros_like(degree).scatter_reduce_(0, parent, degree, "amax")
    index = torch.arange(total, device=device)
    candidate = torch.where(degree == most[parent], index, total)
    best = torch.full_like(index, total).scatter_reduce_(0, parent, candidate, "amin")
    representative, label = torch.unique(best[parent], return_inverse=True)
    return label.view(graphs, nodes), representative
