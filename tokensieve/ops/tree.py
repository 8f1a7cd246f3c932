"""Linking the tokens of consecutive frames into trees (temporal merging of FlashVID)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.ops.merge import MergedTokens, MergeMap, mean_merge
from tokensieve.ops.similarity import as_float32, unit_vectors

_NEVER = -1.0
_LOWEST = -1.0 + 1e-6


class Trees(NamedTuple):
    """Trees over the tokens of a video, whose roots are the tokens without a link.

    Attributes
    ----------
    linked : Tensor
        ``[F, N]`` bool: the token hangs on a token of the frame before.
    root : Tensor
        ``[F, N]`` int64 root of the token's tree as ``frame * N + patch``; a root is its own.
    children : Tensor
        ``[F, N]`` int64 number of tokens that hang directly on the token.
    """

    linked: Tensor
    root: Tensor
    children: Tensor


def previous_frame_matches(features: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar token of the frame before, among tokens that are free.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    free : Tensor
        ``[F, N]`` bool; other tokens match nothing and are matched by nothing.

    Returns
    -------
    similarity : Tensor
        ``[F, N]`` cosine to the match; -1 without one, and in the first frame.
    parent : Tensor
        ``[F, N]`` int64 patch of the match in the frame before; meaningless where the similarity is -1.
    """
    frames, tokens, _ = features.shape
    similarity = features.new_full((frames, tokens), _NEVER, dtype=torch.float32)
    parent = torch.zeros(frames, tokens, dtype=torch.int64, device=features.device)
    before = unit_vectors(features[0])
    for frame in range(1, frames):
        here = unit_vectors(features[frame])
        cosines = (here @ before.T).masked_fill_(~(free[frame].unsqueeze(1) & free[frame - 1]), _NEVER)
        best = cosines.max(dim=1)
        similarity[frame], parent[frame] = best.values.float(), best.indices
        before = here
    return similarity, parent


def link_frames(
    similarity: Tensor, parent: Tensor, segments: list[tuple[int, int]], threshold: float, keep: int
) -> Trees:
    """Link tokens to their matches where these are similar enough, inside segments.

    Parameters
    ----------
    similarity, parent : Tensor
        ``[F, N]`` of `previous_frame_matches`.
    segments : list of (int, int)
        First and last frame of every segment; no link crosses a border.
    threshold : float
        A token is linked if its similarity is strictly above it.
    keep : int
        At least ``keep`` tokens per frame of a segment, on average, stay without a link; the threshold of a segment
        rises until they do.

    Returns
    -------
    Trees
        Of the whole video.
    """
    frames, tokens = similarity.shape
    linked = torch.zeros(frames, tokens, dtype=torch.bool, device=similarity.device)
    root = torch.arange(frames * tokens, device=similarity.device).view(frames, tokens)
    children = torch.zeros_like(root)
    for first, last in segments:
        length = last - first + 1
        links = _segment_links(similarity[first : last + 1], threshold, max(0, (tokens - keep) * length))
        linked[first : last + 1] = links
        for frame in range(first + 1, last + 1):
            above = parent[frame]
            root[frame] = torch.where(linked[frame], root[frame - 1][above], root[frame])
            children[frame - 1].scatter_add_(0, above, linked[frame].long())
    return Trees(linked, root, children)


def _segment_links(similarity: Tensor, threshold: float, allowed: int) -> Tensor:
    """Links ``[L, N]`` of one segment, at most ``allowed`` of them."""
    inside = similarity.clone()
    inside[0] = _NEVER
    links = inside > threshold
    if int(links.sum()) <= allowed:
        return links
    if allowed == 0:
        return torch.zeros_like(links)
    raised = inside.flatten().topk(allowed).values[-1].clamp_min(_LOWEST)
    return inside > raised


def tree_means(features: Tensor, trees: Trees, survives: Tensor, *, by_children: bool = False) -> MergedTokens:
    """Average every tree into its root.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    trees : Trees
        Of `link_frames`.
    survives : Tensor
        ``[F, N]`` bool: tokens to return, all roots of trees with links among them.
    by_children : bool
        Divide the sum of a tree by one more than the number of the root's own children, whatever hangs on these.

    Returns
    -------
    MergedTokens
        Of the surviving tokens, ascending, with features in float32. Weights add up to 1 unless ``by_children``.
    """
    flat = features.flatten(0, 1)
    survivors, hanging = survives.flatten().nonzero()[:, 0], trees.linked.flatten().nonzero()[:, 0]
    place = torch.full((flat.shape[0],), -1, dtype=torch.int64, device=features.device)
    place[survivors] = torch.arange(survivors.numel(), device=features.device)
    target = place[trees.root.flatten()[hanging]]
    if by_children:
        size = 1 + trees.children.flatten()[survivors]
    else:
        size = 1 + torch.bincount(target, minlength=survivors.numel())
    values = as_float32(flat[survivors])
    grown, group = target.unique(return_inverse=True)
    sums = mean_merge(as_float32(flat[hanging]), group, grown.numel()) * torch.bincount(group).unsqueeze(1)
    values[grown] = (values[grown] + sums) / size[grown].unsqueeze(1)
    merge_map = MergeMap(
        torch.cat((survivors, hanging)),
        torch.cat((place[survivors], target)),
        1 / size[torch.cat((place[survivors], target))].float(),
    )
    return MergedTokens(values, survivors, merge_map)
