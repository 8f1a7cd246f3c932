"""VFlowOpt's mathematics: importance, cuts, recycling, and the ratios of a wanted average."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.errors import MethodError, RetentionError
from tokensieve.ops.allocate import check_retention, round_half_even
from tokensieve.ops.entropy import patch_entropy
from tokensieve.ops.focus import focused_mean
from tokensieve.ops.merge import MergedTokens, MergeMap, apply_merge
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32


class Strategy(NamedTuple):
    """Hyper-parameters found for one model and average retention.

    Attributes
    ----------
    threshold
        t, multiple of the mean received attention above which a patch counts as important.
    alpha
        Weight of the pixel entropy.
    grid
        a, side of a recycling cell in patches (a real number).
    ratios
        Share kept at each of the three cuts, of what the cut before left.
    """

    threshold: float
    alpha: float
    grid: float
    ratios: tuple[float, float, float]


STRATEGIES: dict[float, Strategy] = {
    0.5: Strategy(28.683, 0.0, 11.757, (0.72332, 0.74875, 0.487)),
    0.25: Strategy(34.760, 0.0, 15.581, (0.26510, 0.98334, 0.87733)),
    0.1: Strategy(39.265, 0.0, 17.387, (0.11662, 1.0, 0.6011)),
}
"""Released settings by average retention, for LLaVA-OneVision-7B (28 layers, cuts in front of layers 9 and 18)."""
RELEASED_FOR = ((9, 18), 28)
"""Cuts and layers of that model."""


def nearest_strategy(average: float, cuts: tuple[int, int], layers: int) -> Strategy:
    """Released settings, carried over where the average retention or the LLM is another.

    Threshold, grid, R2 and the quotient of R1 and the average are interpolated over the logarithm of the average
    (constant outside of what was released); R3 follows from the constraint. Where the layers leave no room for R3, R1
    is the average itself.

    Parameters
    ----------
    average : float
        Wanted average retention, in (0, 1].
    cuts : tuple of int
        (k1, k2).
    layers : int
        L.
    """
    if (cuts, layers) == RELEASED_FOR and average in STRATEGIES:
        # The released third ratios lie some 0.8 % above what the constraint gives.
        return STRATEGIES[average]
    known = sorted(STRATEGIES)
    below = max((x for x in known if x <= average), default=known[0])
    above = min((x for x in known if x >= average), default=known[-1])
    share = 0.0 if below == above else math.log(average / below) / math.log(above / below)

    def between(low: float, high: float) -> float:
        return low + share * (high - low)

    a, b = STRATEGIES[below], STRATEGIES[above]
    first = min(1.0, average * between(a.ratios[0] / below, b.ratios[0] / above))
    second = between(a.ratios[1], b.ratios[1])
    if first * (cuts[0] + second * (cuts[1] - cuts[0])) >= average * layers:
        first = average
    third = last_ratio(average, first, second, cuts, layers)
    return Strategy(between(a.threshold, b.threshold), 0.0, between(a.grid, b.grid), (first, second, third))


def pixel_entropy(pixels: Tensor, patch: int = 14) -> Tensor:
    """Entropy of the grey values of every patch, in bits (step 1).

    Parameters
    ----------
    pixels : Tensor
        ``[B, 3, h, w]`` in 0..1. Undo the normalisation of an image processor first; the released code does
        not and so counts wrapped values.
    patch : int
        Side of a patch in pixels; h and w are multiples of it.

    Returns
    -------
    Tensor
        ``[B, 1, h / patch, w / patch]`` float32, from 0 to 8.

    Raises
    ------
    MethodError
        If the shape does not fit or a value lies outside 0..1.
    """
    if pixels.numel() and not (float(pixels.min()) >= 0.0 and float(pixels.max()) <= 1.0):
        raise MethodError("pixel entropy needs pixels from 0 to 1; undo the normalisation of the image processor.")
    return patch_entropy((as_float32(pixels) * 255).floor(), patch).unsqueeze(1)


def importance_map(attention: Tensor, threshold: float, entropy: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Importance of every patch of a picture (step 1).

    Parameters
    ----------
    attention : Tensor
        ``[B, N, N]`` softmax maps of the last used tower layer, queries by keys, mean over heads (or
        ``[B, H, N, N]`` per head). `tokensieve.ops.focus.focused_attention` gives the first term from queries
        and keys.
    threshold : float
        t. Patches that receive more than t times the mean are important; without any, all are.
    entropy : Tensor, optional
        ``[B, 1, rows, columns]`` from `pixel_entropy`.
    alpha : float
        Weight of the softmax of the entropy over the picture; 0 in all released settings.

    Returns
    -------
    Tensor
        ``[B, N]`` float32.

    Raises
    ------
    MethodError
        If alpha is not 0 and the entropy is missing.
    """
    maps = as_float32(attention)
    importance = focused_mean(maps.mean(dim=1) if maps.dim() == 4 else maps, threshold)
    return add_entropy(importance, entropy, alpha)


def add_entropy(importance: Tensor, entropy: Tensor | None, alpha: float) -> Tensor:
    """Importance ``[B, N]`` plus ``alpha`` times the softmax of the entropy ``[B, 1, rows, columns]`` (step 1)."""
    if alpha == 0:
        return importance
    if entropy is None or entropy.flatten(1).shape != importance.shape:
        raise MethodError(f"alpha is {alpha}, so that the entropy of every patch is needed; pass it, or alpha=0.")
    return importance + alpha * as_float32(entropy).flatten(1).softmax(dim=-1)


def survivors(total: int, retention: float) -> int:
    """Tokens left by one cut, ``total - round(total * (1 - retention))`` (steps 2b, 2c and 3)."""
    return total - round_half_even(total * (1 - check_retention(retention)))


def select_important(importance: Tensor, retention: float, separators: int = 0) -> Tensor:
    """Most important tokens of a whole video, of one picture, or of what an earlier cut left (2b, 2c, 3).

    Parameters
    ----------
    importance : Tensor
        ``[n]``, pooled like the features.
    retention : float
        Share kept, in (0, 1].
    separators : int
        Newline tokens behind the video: they count as tokens, are always kept, and take no part here.

    Returns
    -------
    Tensor
        ``[k]`` int64, ascending; at least one.
    """
    total = importance.numel() + separators
    return top_indices(importance, max(1, survivors(total, retention) - separators))


def grid_cells(view: Tensor, row: Tensor, column: Tensor, grid: float) -> Tensor:
    """Recycling cell of every token: the ``grid x grid`` square of its view that it lies in (step 2).

    Parameters
    ----------
    view, row, column : Tensor
        ``[n]`` int64; the base picture and the mosaic of tiles are two views.
    grid : float
        a, above 0.

    Returns
    -------
    Tensor
        ``[n]`` int64, numbered from 0 without gaps.

    Raises
    ------
    MethodError
        If ``grid`` is not above 0.
    """
    if not grid > 0:
        raise MethodError(f"grid is {grid}, but a recycling cell must be larger than 0 patches; the code uses 3 to 24.")
    place = torch.stack((view, (row.float() / grid).floor().long(), (column.float() / grid).floor().long()), dim=1)
    return place.unique(dim=0, return_inverse=True)[1]


def prune_and_recycle(
    features: Tensor, importance: Tensor, cell: Tensor, retention: float, grid: float, separators: int = 0
) -> MergedTokens:
    """Cut the least important tokens of a picture and put one average per cell back (step 2).

    Parameters
    ----------
    features : Tensor
        ``[n, D]`` tokens of the base picture and of the mosaic.
    importance : Tensor
        ``[n]``; 1 for newline tokens if they are passed.
    cell : Tensor
        ``[n]`` from `grid_cells`.
    retention : float
        R1, in (0, 1].
    grid : float
        a; ``int(n / a^2)`` further tokens are cut to make up for the recycled ones.
    separators : int
        Newline tokens that are not passed but count as tokens.

    Returns
    -------
    MergedTokens
        Survivors in order. A recycled token stands at the most important token of its cell and is the mean of
        what was cut there, weighted by importance. Its number is usually a little above ``n * R1``.

    Raises
    ------
    RetentionError, MethodError
        If the retention or the shapes do not fit.
    """
    check_retention(retention)
    count = features.shape[0]
    if importance.shape != (count,) or cell.shape != (count,):
        raise MethodError(
            f"recycling needs one importance and one cell for each of {count} tokens, but the shapes are "
            f"{tuple(importance.shape)} and {tuple(cell.shape)}."
        )
    total = count + separators
    low = min(count, round_half_even(total * (1 - retention)) + int(total / grid**2))
    cut = top_indices(importance, low, largest=False)
    used, slot = cell.to(cut.device)[cut].unique(return_inverse=True)
    # A negative weight of the entropy can make the least important tokens weigh less than nothing.
    weight = as_float32(importance)[cut].clamp(min=0)
    sums = weight.new_zeros(used.numel()).index_add(0, slot, weight)
    sizes = torch.bincount(slot, minlength=used.numel())
    # A cell without any importance has no weighted mean; its plain mean is taken.
    weight = torch.where(sums[slot] > 0, weight / sums[slot], 1.0 / sizes[slot])
    recycled = apply_merge(features, MergeMap(cut, slot, weight), used.numel())
    by_rank = cut[top_indices(importance[cut], low, order="rank")]
    owner = cell.to(cut.device)[by_rank].unique(return_inverse=True)[1]
    best = torch.full((used.numel(),), low, device=cut.device)
    best.scatter_reduce_(0, owner, torch.arange(low, device=cut.device), "amin")
    home = by_rank[best]
    stays = torch.ones(count, dtype=torch.bool, device=features.device)
    stays[cut] = False
    untouched = stays.nonzero()[:, 0]
    stays[home] = True
    keep = stays.nonzero()[:, 0]
    place = torch.zeros(count, dtype=torch.int64, device=cut.device)
    place[keep] = torch.arange(keep.numel(), device=keep.device)
    rows = features[keep]
    rows[place[home]] = recycled
    merge_map = MergeMap(
        torch.cat((untouched, cut)),
        torch.cat((place[untouched], place[home][slot])),
        torch.cat((torch.ones_like(untouched, dtype=torch.float32), weight.float())),
    )
    return MergedTokens(rows, keep, merge_map)


def average_retention(ratios: tuple[float, float, float], cuts: tuple[int, int], layers: int) -> float:
    """Visual tokens per layer averaged over the LLM, as a share of the uncompressed number (step 4).

    Parameters
    ----------
    ratios : tuple of float
        (R1, R2, R3): kept in front of the LLM and at each cut inside, of what was left.
    cuts : tuple of int
        (k1, k2): layers in front of which the LLM cuts.
    layers : int
        L.
    """
    first, second, third = ratios
    k1, k2 = cuts
    return first * (k1 + second * (k2 - k1) + second * third * (layers - k2)) / layers


def last_ratio(average: float, first: float, second: float, cuts: tuple[int, int], layers: int) -> float:
    """R3 that gives a wanted average retention, at most 1 (step 4).

    Raises
    ------
    RetentionError
        If the first two parts of the LLM alone already use up the average.
    """
    k1, k2 = cuts
    left = layers * average - first * k1 - first * second * (k2 - k1)
    if left <= 0:
        raise RetentionError(
            f"an average retention of {average} cannot be reached with R1 = {first} and R2 = {second} up to layer "
            f"{k2} of {layers}; lower them or raise the average."
        )
    return min(1.0, left / (layers - k2) / (first * second))
