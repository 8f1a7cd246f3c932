"""Merging tokens: sparse merge maps and the averages they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.ops.similarity import as_float32


class MergeMap(NamedTuple):
    """Which source token contributes to which output token, and with what weight.

    Attributes
    ----------
    source : Tensor
        ``[E]`` int64 indices of source tokens.
    target : Tensor
        ``[E]`` int64 positions of output tokens.
    weight : Tensor
        ``[E]`` float32; the weights of one output token add up to 1.
    """

    source: Tensor
    target: Tensor
    weight: Tensor


class MergedTokens(NamedTuple):
    """Result of a merge.

    Attributes
    ----------
    features : Tensor
        ``[M, D]`` output tokens in output order.
    source : Tensor
        ``[M]`` int64, the source token that stands for each output token (its place in the video); without
        duplicates, but not always ascending.
    merge_map : MergeMap
        How each output token is made from source tokens; ``apply_merge`` of it reproduces ``features``.
    """

    features: Tensor
    source: Tensor
    merge_map: MergeMap


_ROWS = 256
"""Rows handled together on a processor: what is written for them stays in its cache."""


def grouped_sum(values: Tensor, group: Tensor, groups: int, weights: Tensor | None = None) -> Tensor:
    """Sum the rows of each group; the order of summation is fixed on every device.

    Parameters
    ----------
    values : Tensor
        ``[E, ...]`` float.
    group : Tensor
        ``[E]`` int64 in ``0..groups-1``.
    groups : int
        Number of groups.
    weights : Tensor, optional
        ``[E]`` factor of every row.

    Returns
    -------
    Tensor
        ``[groups, ...]``; zero for groups without rows.
    """
    return gathered_sum(values, None, group, groups, weights)


def gathered_sum(
    values: Tensor, source: Tensor | None, group: Tensor, groups: int, weights: Tensor | None = None
) -> Tensor:
    """`grouped_sum` of the rows ``values[source]`` (all rows where it is None), without a copy of all of them."""
    sums = values.new_zeros(groups, *values.shape[1:])
    if group.numel() == 0:
        return sums
    if values.device.type == "cpu":
        for start in range(0, group.numel(), _ROWS):
            place = slice(start, start + _ROWS)
            part = values[place if source is None else source[place]]
            sums.index_add_(0, group[place], part if weights is None else _scaled(part, weights[place]))
        return sums
    order = group.sort(stable=True).indices
    part = values[order if source is None else source[order]]
    part = part if weights is None else _scaled(part, weights[order])
    return torch.segment_reduce(part, "sum", lengths=torch.bincount(group, minlength=groups), axis=0)


def _scaled(rows: Tensor, factors: Tensor) -> Tensor:
    """Rows ``[E, ...]`` times a factor each."""
    return rows * factors.to(rows.dtype).view(-1, *(1,) * (rows.dim() - 1))


def unmerged(features: Tensor, source: Tensor) -> MergedTokens:
    """Source tokens taken over as they are.

    Parameters
    ----------
    features : Tensor
        ``[n, D]`` all source tokens.
    source : Tensor
        ``[M]`` int64 indices of the tokens to take.

    Returns
    -------
    MergedTokens
        Features, sources and an identity map.
    """
    target = torch.arange(source.numel(), device=source.device)
    return MergedTokens(
        features[source], source, MergeMap(source, target, torch.ones_like(target, dtype=torch.float32))
    )


def join_merged(parts: Sequence[MergedTokens]) -> MergedTokens:
    """Put the outputs of several merges one after the other.

    Parameters
    ----------
    parts : sequence of MergedTokens
        At least one; all refer to the same source tokens.

    Returns
    -------
    MergedTokens
        All output tokens in the order of the parts.
    """
    sizes = [part.source.numel() for part in parts]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    maps = [part.merge_map for part in parts]
    merge_map = MergeMap(
        torch.cat([m.source for m in maps]),
        torch.cat([m.target + start for m, start in zip(maps, starts, strict=True)]),
        torch.cat([m.weight for m in maps]),
    )
    return MergedTokens(torch.cat([p.features for p in parts]), torch.cat([p.source for p in parts]), merge_map)


def sort_merged(tokens: MergedTokens) -> MergedTokens:
    """Bring the output tokens of a merge into ascending order of their source.

    Parameters
    ----------
    tokens : MergedTokens
        Output tokens in any order.

    Returns
    -------
    MergedTokens
        The same tokens with ascending ``source``.
    """
    order = tokens.source.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    merge_map = tokens.merge_map._replace(target=place[tokens.merge_map.target])
    return MergedTokens(tokens.features[order], tokens.source[order], merge_map)


def apply_merge(features: Tensor, merge_map: MergeMap, outputs: int) -> Tensor:
    """Weighted sums of source tokens as a merge map describes them.

    Parameters
    ----------
    features : Tensor
        ``[n, D]`` source tokens.
    merge_map : MergeMap
        Entries with source below n and target below ``outputs``.
    outputs : int
        Number of output tokens M.

    Returns
    -------
    Tensor
        ``[M, D]`` in the dtype of ``features``, summed in float32; an output without entries is zero.
    """
    work = as_float32(features)
    return gathered_sum(work, merge_map.source, merge_map.target, outputs, merge_map.weight).to(features.dtype)


def weighted_merge(features: Tensor, weights: Tensor, group: Tensor, groups: int) -> Tensor:
    """Weighted mean of the tokens of each group.

    Parameters
    ----------
    features : Tensor
        ``[n, D]``.
    weights : Tensor
        ``[n]``, not negative; only their proportions inside a group matter.
    group : Tensor
        ``[n]`` int64 in ``0..groups-1``.
    groups : int
        Number of groups.

    Returns
    -------
    Tensor
        ``[groups, D]`` in the dtype of ``features``; groups that are empty or weigh nothing are zero.
    """
    work = as_float32(features)
    totals = grouped_sum(weights.to(work.dtype), group, groups)
    return _divided(grouped_sum(work, group, groups, weights), totals).to(features.dtype)


def _divided(sums: Tensor, totals: Tensor) -> Tensor:
    """Sums ``[M, ...]`` over their totals ``[M]``; zero where the total is."""
    totals = totals.view(-1, *(1,) * (sums.dim() - 1))
    return (sums / totals).masked_fill_(totals <= 0, 0)


def mean_merge(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean of the tokens of each group.

    Parameters
    ----------
    features : Tensor
        ``[n, D]``.
    group : Tensor
        ``[n]`` int64 in ``0..groups-1``.
    groups : int
        Number of groups.

    Returns
    -------
    Tensor
        ``[groups, D]`` in the dtype of ``features``; empty groups are zero.
    """
    sums = grouped_sum(as_float32(features), group, groups)
    return _divided(sums, torch.bincount(group, minlength=groups).to(sums.dtype)).to(features.dtype)


def sequential_average_weights(target: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Weights that repeated averaging ``base = (base + arrival) / 2`` gives to the base and to each arrival.

    With m arrivals at one target the base weighs ``2^-m`` and the arrivals, in order, ``2^-m, ..., 1/4,
    1/2``.

    Parameters
    ----------
    target : Tensor
        ``[m]`` int64 target of each arrival, in order of arrival.
    outputs : int
        Number of targets.

    Returns
    -------
    base_weight : Tensor
        ``[outputs]`` float32; 1 where nothing arrives.
    arrival_weight : Tensor
        ``[m]`` float32.
    """
    arrivals = torch.bincount(target, minlength=outputs)
    order = target.sort(stable=True).indices
    last = arrivals.cumsum(0)
    steps_to_last = torch.empty_like(target)
    steps_to_last[order] = last[target[order]] - torch.arange(target.numel(), device=target.device)
    return torch.exp2(-arrivals.float()), torch.exp2(-steps_to_last.float())


def sequential_average(base: Tensor, arrivals: Tensor, target: Tensor) -> Tensor:
    """Average arrivals into their targets one after the other, ``base[j] <- (base[j] + arrival) / 2``.

    Parameters
    ----------
    base : Tensor
        ``[M, D]``.
    arrivals : Tensor
        ``[m, D]`` in order of arrival.
    target : Tensor
        ``[m]`` int64 row of ``base`` for each arrival.

    Returns
    -------
    Tensor
        ``[M, D]`` in the dtype of ``base``, computed in float32 by the closed form of the weights.
    """
    base_weight, arrival_weight = sequential_average_weights(target, base.shape[0])
    work = as_float32(base)
    summed = grouped_sum(as_float32(arrivals), target, base.shape[0], arrival_weight)
    return (work * base_weight.to(work.dtype).unsqueeze(-1) + summed).to(base.dtype)
