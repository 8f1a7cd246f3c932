"""Temporal and spatial merging of static patches, selection of dynamic ones: the mathematics of HoliTom.

Based on "HoliTom: Holistic Token Merging for Fast Video Large Language Models" (arXiv 2505.21334); step numbers
follow the order of the published algorithm.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.allocate import check_retention, round_half_even
from tokensieve.ops.cluster import density_peaks
from tokensieve.ops.merge import (
    MergedTokens,
    MergeMap,
    apply_merge,
    join_merged,
    sequential_average,
    sequential_average_weights,
    sort_merged,
    unmerged,
)
from tokensieve.ops.segment import segment_static
from tokensieve.ops.select import top_mask
from tokensieve.ops.similarity import as_float32, neighbour_cosine, unit_vectors

THRESHOLD = 0.8
BETA = 0.6
NEIGHBOURS = 7
MAX_WINDOW = 1024


def adjusted_retention(retention: float, frames: int, tokens_per_frame: int, reduced: int) -> float:
    """Retention among the tokens left by temporal merging, ``min(1, R F N / (F N - reduced))`` (step 4).

    Parameters
    ----------
    retention : float
        R in (0, 1], of the uncompressed number of tokens.
    frames, tokens_per_frame : int
        F and N.
    reduced : int
        Tokens that temporal merging saves.

    Returns
    -------
    float
        In (0, 1].

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    """
    total = frames * tokens_per_frame
    return min(1.0, check_retention(retention) / ((total - reduced) / total))


def static_patches(similarity: Tensor, segments: list[tuple[int, int]], threshold: float = THRESHOLD) -> Tensor:
    """Patches that stay similar through the whole segment of their frame (step 5).

    Parameters
    ----------
    similarity : Tensor
        ``[F-1, N]`` cosine of each patch with itself in the next frame.
    segments : list of (int, int)
        First and last frame of each segment, covering all frames in order.
    threshold : float
        A patch is similar if its value is strictly above it.

    Returns
    -------
    Tensor
        ``[F, N]`` bool; all false in segments of one frame.
    """
    similar = similarity > threshold
    mask = similar.new_zeros(similar.shape[0] + 1, similar.shape[1])
    for first, last in segments:
        if last > first:
            mask[first : last + 1] = similar[first:last].all(dim=0)
    return mask


def cluster_weights(centres: Tensor, assignment: Tensor, beta: float | None = BETA) -> Tensor:
    """Weight of every token in the merged token of its cluster (step 7).

    Parameters
    ----------
    centres : Tensor
        ``[c]`` indices of the cluster centres.
    assignment : Tensor
        ``[n]`` cluster of each token, centres included.
    beta : float, optional
        Weight of the centre; its members share ``1 - beta``. A centre without members weighs 1. None is the
        plain mean over centre and members.

    Returns
    -------
    Tensor
        ``[n]`` float32.
    """
    sizes = torch.bincount(assignment, minlength=centres.numel()).double()
    if beta is None:
        return (1.0 / sizes)[assignment].float()
    weight = ((1.0 - beta) / (sizes - 1).clamp_min(1))[assignment]
    weight[centres] = (sizes > 1).double() * (beta - 1.0) + 1.0
    return weight.float()


def _clustered(
    means: Tensor, places: Tensor, span: int, stride: int, clusters: int, neighbours: int, beta: float | None
) -> MergedTokens:
    """Clusters of ``means [n, D]`` that stand at source ``places [n]`` and in the frames that follow."""
    centres, assignment = density_peaks(means, clusters, neighbours)
    weight = cluster_weights(centres, assignment, beta)
    inside = MergeMap(torch.arange(places.numel(), device=places.device), assignment, weight)
    frames = torch.arange(span, device=places.device).unsqueeze(1) * stride
    merge_map = MergeMap((places + frames).flatten(), assignment.repeat(span), (weight / span).repeat(span))
    return MergedTokens(apply_merge(means, inside, clusters), places[centres], merge_map)


def outer_merge(
    features: Tensor,
    attention: Tensor,
    retention: float,
    *,
    threshold: float = THRESHOLD,
    beta: float = BETA,
    plain_mean: bool = False,
    neighbours: int = NEIGHBOURS,
    max_window: int = MAX_WINDOW,
    context_ratio: float = 0.0,
    layout: Literal["flat", "grid"] = "flat",
    segmentation: tuple[list[tuple[int, int]], int] | None = None,
) -> MergedTokens:
    """Merge and select the visual tokens of a video before the LLM (steps 1 to 8).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features.
    attention : Tensor
        ``[F, N]`` mean attention that each patch receives in the last used encoder layer, pooled like the
        features.
    retention : float
        R in (0, 1], of all ``F * N`` tokens. Rounding up per frame can exceed it; a very static video stays
        below.
    threshold : float
        Cosine above which a patch counts as unchanged between two frames (0.8; 0.65 for R = 0.1).
    beta : float
        Weight of a cluster centre in its merged token.
    plain_mean : bool
        Replace the beta rule by the mean over centre and members.
    neighbours : int
        k of the density in the clustering.
    max_window : int
        Largest number of frames in a segment.
    context_ratio : float
        Share of the dynamic budget that is clustered instead of selected. 0 in all published results; the
        reference implementation fails for other values, here every frame clusters what attention did not
        select.
    layout : {"flat", "grid"}
        ``flat``: per segment the static tokens, then the dynamic tokens frame by frame. ``grid``: the
        static tokens take their places among the dynamic tokens of the segment's first frame.
    segmentation : tuple, optional
        Segments and reduced tokens, if ``segment_static`` has been run before on the same features.

    Returns
    -------
    MergedTokens
        Output tokens in reading order. ``source`` is ``frame * N + patch``; a merged static token stands at
        the patch of its cluster centre in the first frame of its segment.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    MethodError
        If shapes do not match, ``context_ratio`` is outside [0, 1], or no token would be left.
    """
    if features.dim() != 3 or attention.shape != features.shape[:2]:
        raise MethodError(
            f"HoliTom needs features [F, N, D] and attention [F, N], but the shapes are "
            f"{tuple(features.shape)} and {tuple(attention.shape)}."
        )
    if not 0.0 <= context_ratio <= 1.0:
        raise MethodError(f"context_ratio is {context_ratio}, but it is a share from 0 to 1; the published value is 0.")
    frames, tokens, _ = features.shape
    similarity = neighbour_cosine(features)
    segments, reduced = segmentation or segment_static(similarity, threshold, max_window)
    ratio = adjusted_retention(retention, frames, tokens, reduced)
    static = static_patches(similarity, segments, threshold)
    centre_weight = None if plain_mean else beta
    flat = features.flatten(0, 1)
    parts: list[MergedTokens] = []
    for first, last in segments:
        still = static[first].nonzero()[:, 0]
        moving = (~static[first]).nonzero()[:, 0]
        pieces: list[MergedTokens] = []
        clusters = round_half_even(still.numel() * ratio)
        if clusters > 0:
            means = as_float32(features[first : last + 1, still]).mean(dim=0)
            merged = _clustered(
                means, first * tokens + still, last - first + 1, tokens, clusters, neighbours, centre_weight
            )
            pieces.append(merged._replace(features=merged.features.to(features.dtype)))
        wanted = math.ceil(moving.numel() * ratio)
        selected = round_half_even(wanted * (1.0 - context_ratio))
        for frame in range(first, last + 1) if wanted else ():
            best = top_mask(attention[frame, moving], selected)
            frame_pieces = [unmerged(flat, frame * tokens + moving[best])]
            if selected < wanted:
                rest = frame * tokens + moving[~best]
                context = _clustered(
                    as_float32(flat[rest]), rest, 1, tokens, wanted - selected, neighbours, centre_weight
                )
                frame_pieces.append(context._replace(features=context.features.to(features.dtype)))
            if frame == first and layout == "grid":
                frame_pieces += pieces
                pieces = []
            pieces.append(sort_merged(join_merged(frame_pieces)))
        parts += pieces
    if not parts:
        raise MethodError(f"retention {retention} leaves no token of {frames} static frames; raise the retention.")
    return join_merged(parts)


def inner_plan(visual: Tensor, scores: Tensor, drop_ratio: float) -> tuple[Tensor, MergeMap]:
    """Which visual tokens stay inside the LLM, and where the others go (steps 9 to 12).

    Parameters
    ----------
    visual : Tensor
        ``[T, D]`` hidden states of the visual tokens before layer k.
    scores : Tensor
        ``[T]`` attention of the last prompt token in layer k-1, mean over heads.
    drop_ratio : float
        r in [0, 1): ``round(T (1 - r))`` tokens stay, at least one.

    Returns
    -------
    keep : Tensor
        ``[n]`` int64, ascending.
    merge_map : MergeMap
        Sources among the T tokens, targets among the n kept ones; every dropped token goes to the kept
        token of largest cosine, in ascending order, each time ``target <- (target + dropped) / 2``.

    Raises
    ------
    MethodError
        If ``drop_ratio`` is outside [0, 1) or the shapes do not match.
    """
    keep, dropped, target = inner_assignment(visual, scores, drop_ratio)
    of_kept, of_dropped = sequential_average_weights(target, keep.numel())
    places = torch.arange(keep.numel(), device=keep.device)
    merge_map = MergeMap(torch.cat((keep, dropped)), torch.cat((places, target)), torch.cat((of_kept, of_dropped)))
    return keep, merge_map


def inner_assignment(visual: Tensor, scores: Tensor, drop_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Kept ids [n], dropped ids [T-n] and the kept slot that each dropped one goes to [T-n]."""
    if not 0.0 <= drop_ratio < 1.0:
        raise MethodError(
            f"drop_ratio is {drop_ratio}, but it must be at least 0 and below 1; the published value is 0.5."
        )
    if visual.dim() != 2 or scores.shape != visual.shape[:1] or scores.numel() == 0:
        raise MethodError(
            f"inner merging needs states [T, D] and scores [T], but the shapes are {tuple(visual.shape)} and "
            f"{tuple(scores.shape)}."
        )
    stays = top_mask(scores, max(1, round_half_even(scores.numel() * (1.0 - drop_ratio))))
    units = unit_vectors(visual)
    target = (units[~stays] @ units[stays].T).argmax(dim=1)
    return stays.nonzero()[:, 0], (~stays).nonzero()[:, 0], target


def inner_merge(
    hidden: Tensor, attention_last_token: Tensor, start: int, length: int, drop_ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Merge visual tokens of one prompt before layer k of the LLM (steps 9 to 13).

    Parameters
    ----------
    hidden : Tensor
        ``[L, D]`` output of layer k-1.
    attention_last_token : Tensor
        ``[L]`` attention of the last prompt token in layer k-1, mean over heads.
    start, length : int
        The visual span ``start .. start + length - 1``.
    drop_ratio : float
        r in [0, 1).

    Returns
    -------
    kept_positions : Tensor
        ``[L']`` int64 positions that remain, ascending; they stay the rotary positions. ``L' = L - T +
        round(T (1 - r))``.
    new_hidden : Tensor
        ``[L', D]`` states with the dropped tokens averaged in; text rows are unchanged.

    Raises
    ------
    MethodError
        If the span leaves the sequence, or see ``inner_plan``.
    """
    total = hidden.shape[0]
    end = start + length
    if start < 0 or length < 1 or end > total:
        raise MethodError(f"the visual span {start}..{end - 1} is not inside the {total} tokens of the prompt.")
    visual = hidden[start:end]
    keep, dropped, target = inner_assignment(visual, attention_last_token[start:end], drop_ratio)
    merged = sequential_average(visual[keep], visual[dropped], target)
    positions = torch.arange(total, device=hidden.device)
    kept_positions = torch.cat((positions[:start], start + keep, positions[end:]))
    return kept_positions, torch.cat((hidden[:start], merged, hidden[end:]))
