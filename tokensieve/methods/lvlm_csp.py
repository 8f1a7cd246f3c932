"""LVLM_CSP: few tokens in the first layers, all of them in the middle, the attended ones at the end.

Based on "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning
Segmentation" (arXiv 2504.10854). The first LLM layers see one representative per cluster of the token grid, then all
tokens are active again, and the last layers keep those that the segmentation token attends to.

Tokens that come back after they were left out need key-value caches of different lengths and order, which the
runtime does not have, so there is no registered method of this name. The sets and counts are here as functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32


class LayerSplit(NamedTuple):
    """Layers of the three stages and the tokens that the first and the last stage see.

    Attributes
    ----------
    clustering, scattering, pruning : int
        Numbers of consecutive layers.
    representatives, survivors : int
        N_c and N_p.
    """

    clustering: int
    scattering: int
    pruning: int
    representatives: int
    survivors: int


_PRESETS = {65: (8 / 32, 8 / 32), 70: (9 / 32, 6 / 32)}


def _check_count(tokens: int, count: int) -> None:
    if not 1 <= count <= tokens:
        raise MethodError(f"cannot choose {count} representatives of {tokens} tokens; choose at least 1, at most all.")


def uniform_set(tokens: int, count: int) -> Tensor:
    """Representatives at a regular stride (step 1, "uniform").

    Parameters
    ----------
    tokens : int
        N.
    count : int
        N_c, from 1 to N.

    Returns
    -------
    Tensor
        ``[N_c]`` int64, ``i * (N // N_c)`` as published: the end of the grid stays unseen where N_c does not divide N.

    Raises
    ------
    MethodError
        If N_c is out of range.
    """
    _check_count(tokens, count)
    return torch.arange(count) * (tokens // count)


def random_set(tokens: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` distinct tokens, ascending (step 1, "random"); MethodError if there are not as many."""
    _check_count(tokens, count)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def class_set(attention: Tensor, count: int) -> Tensor:
    """Tokens with the largest attention of the class token ``[N]``, ascending (step 1, "cls"); lowest id on ties."""
    _check_count(attention.numel(), count)
    return top_indices(as_float32(attention), count)


def object_quotas(areas: Tensor, count: int) -> Tensor:
    """Representatives of every object, ``max(1, floor(N_c * area / all areas))`` (step 1, "seg-first").

    Parameters
    ----------
    areas : Tensor
        ``[O]`` tokens of every object, at least 1 each.
    count : int
        N_c.

    Returns
    -------
    Tensor
        ``[O]`` int64; their sum can be below or, with many small objects, above N_c.

    Raises
    ------
    MethodError
        If an object is empty.
    """
    areas = areas.long()
    if areas.numel() == 0 or int(areas.min()) < 1:
        raise MethodError(f"quotas need objects of at least one token each, but the areas are {areas.tolist()}.")
    return (areas * count).div(areas.sum(), rounding_mode="floor").clamp_min(1)


def object_set(masks: Tensor, count: int) -> Tensor:
    """Representatives inside the objects of a segmenter (step 1, "seg-first").

    Parameters
    ----------
    masks : Tensor
        ``[O, N]`` bool on the token grid; they may overlap, and empty ones are left out.
    count : int
        N_c, from 1 to N.

    Returns
    -------
    Tensor
        ``[N_c]`` int64, ascending. Objects are sampled at a regular stride. Too many are taken back one by one from
        the object with most (of these the smallest); what is missing comes at a regular stride from all other tokens.

    Raises
    ------
    MethodError
        If the masks have another shape or N_c is out of range.
    """
    if masks.dim() != 2:
        raise MethodError(f"object masks must be [O, N], but the shape is {tuple(masks.shape)}.")
    tokens = masks.shape[1]
    _check_count(tokens, count)
    masks = masks.bool()
    masks = masks[masks.any(dim=1)]
    chosen = torch.zeros(tokens, dtype=torch.bool, device=masks.device)
    if masks.shape[0]:
        areas = masks.sum(dim=1).cpu()
        quotas = object_quotas(areas, count)
        while int(quotas.sum()) > count:
            most = (quotas == quotas.max()).nonzero().flatten()
            quotas[most[areas[most].argmin()]] -= 1
        for mask, quota in zip(masks, quotas.tolist(), strict=True):
            members = mask.nonzero().flatten()
            if quota:
                chosen[members[uniform_set(members.numel(), quota).to(members.device)]] = True
    others = (~chosen).nonzero().flatten()
    missing = count - int(chosen.sum())
    if missing:
        chosen[others[uniform_set(others.numel(), missing).to(others.device)]] = True
    return chosen.nonzero().flatten()


def attended_set(attention: Tensor, count: int) -> Tensor:
    """Tokens that the last stage keeps (step 4).

    Parameters
    ----------
    attention : Tensor
        ``[H, V]`` attention of the segmentation token, or of the last prompt token where there is none, to all visual
        tokens in the last layer of the middle stage.
    count : int
        N_p, from 1 to V.

    Returns
    -------
    Tensor
        ``[N_p]`` int64, ascending; lowest id on ties.

    Raises
    ------
    MethodError
        If N_p is out of range.
    """
    _check_count(attention.shape[-1], count)
    return top_indices(as_float32(attention).mean(dim=0), count)


def preset(layers: int, tokens: int, reduction: int = 65) -> LayerSplit:
    """A split that saves about 65 or 70 % of the tokens per layer (our choice; the published split is unknown).

    Parameters
    ----------
    layers : int
        L, at least 3. For 32 layers the stages have 8, 8, 16 or 9, 6, 17 layers.
    tokens : int
        N. A quarter of them represent, a sixteenth survive, at least one each.
    reduction : {65, 70}
        In percent.

    Returns
    -------
    LayerSplit

    Raises
    ------
    MethodError
        If there is no such preset or the model is too shallow.
    """
    if reduction not in _PRESETS or layers < 3:
        raise MethodError(
            f"no preset has {reduction} % fewer tokens in {layers} layers; use 65 or 70 % and 3 layers at least."
        )
    first, second = (max(1, round(layers * share)) for share in _PRESETS[reduction])
    return LayerSplit(first, second, layers - first - second, max(1, tokens // 4), max(1, tokens // 16))


def tokens_per_layer(split: LayerSplit, tokens: int) -> list[int]:
    """Visual tokens in every layer, which is also what its key-value cache holds of them."""
    return [split.representatives] * split.clustering + [tokens] * split.scattering + [split.survivors] * split.pruning


def average_share(split: LayerSplit, tokens: int) -> float:
    """Mean number of visual tokens per layer as a share of all; the reduction is what is missing to 1."""
    counts = tokens_per_layer(split, tokens)
    return sum(counts) / len(counts) / tokens
