"""Bipartite matching of tokens: one half proposes, the other half receives (ToMe; building block of many others).

A matching is a partition of the tokens of every row of a batch: each token belongs to one output, and each output is
named after the one token that did not have to move. Merging and unmerging are a reduction and a gather over it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.merge import MergeMap, apply_merge, mean_merge
from tokensieve.ops.similarity import as_float32, unit_vectors

Mode = Literal["mean", "sum", "amax"]

_MAX_BYTES = 256 * 1024 * 1024


class TokenGroups(NamedTuple):
    """A partition of T tokens into M outputs, for every row of a batch.

    Attributes
    ----------
    group : Tensor
        ``[B, T]`` int64 output that each token belongs to.
    source : Tensor
        ``[B, M]`` int64 token that stands for each output.
    """

    group: Tensor
    source: Tensor


def identity_groups(batch: int, tokens: int, device: torch.device | None = None) -> TokenGroups:
    """Every token on its own, in its place."""
    idx = torch.arange(tokens, device=device).expand(batch, -1)
    return TokenGroups(idx, idx)


def _check(metric: Tensor) -> tuple[int, int]:
    if metric.dim() != 3 or metric.shape[1] == 0:
        raise MethodError(f"matching needs a metric [B, T, c] with tokens, but the shape is {tuple(metric.shape)}.")
    return metric.shape[0], metric.shape[1]


def _best(proposers: Tensor, receivers: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    """Largest cosine ``[B, A]`` of each proposer to a receiver and that receiver (the first one on ties)."""
    batch, count = receivers.shape[:2]
    rows = max(1, _MAX_BYTES // (4 * batch * max(count, 1)))
    values, partners = [], []
    for start in range(0, proposers.shape[1], rows):
        scores = proposers[:, start : start + rows] @ receivers.transpose(1, 2)
        if class_token and start == 0:
            scores[:, 0] = float("-inf")
        if distill_token:
            scores[:, :, 0] = float("-inf")
        value, partner = scores.max(dim=2)
        values.append(value)
        partners.append(partner)
    return torch.cat(values, dim=1), torch.cat(partners, dim=1)


def alternate_match(
    metric: Tensor, remove: int, *, class_token: bool = False, distill_token: bool = False
) -> TokenGroups:
    """Match tokens at even places with their most similar ones at odd places (ToMe, steps 1 to 5).

    Parameters
    ----------
    metric : Tensor
        ``[B, T, c]``; compared by cosine.
    remove : int
        r, tokens to remove, limited to half of those that are not protected.
    class_token, distill_token : bool
        Whether place 0 holds a class token and place 1 a distillation token; neither takes part.

    Returns
    -------
    TokenGroups
        M = T - r. First the even tokens that found no place, by falling similarity (ascending with a class
        token), then all odd ones; class and distillation token in front.

    Raises
    ------
    MethodError
        If the metric has another shape.
    """
    batch, tokens = _check(metric)
    remove = min(remove, (tokens - int(class_token) - int(distill_token)) // 2)
    if remove <= 0:
        return identity_groups(batch, tokens, metric.device)
    units = unit_vectors(metric)
    value, partner = _best(units[:, ::2], units[:, 1::2], class_token, distill_token)
    ranked = value.sort(dim=1, descending=True, stable=True).indices
    merged, left = ranked[:, :remove], ranked[:, remove:]
    if class_token:
        left = left.sort(dim=1).values
    odd = torch.arange(1, tokens, 2, device=metric.device).expand(batch, -1)
    source = torch.cat((left * 2, odd), dim=1)
    if distill_token:
        alone = left.shape[1]
        outputs = torch.arange(source.shape[1], device=metric.device)
        order = torch.cat((outputs[:1], outputs[alone : alone + 1], outputs[1:alone], outputs[alone + 1 :]))
        source = source[:, order]
    return _grouped(source, merged * 2, partner.gather(1, merged) * 2 + 1, tokens)


def run_match(metric: Tensor, k: int) -> TokenGroups:
    """Keep the last token of every run of k and merge all others into the kept token most similar to them.

    Parameters
    ----------
    metric : Tensor
        ``[B, T, c]``; compared by cosine.
    k : int
        Length of a run; 1 or less changes nothing.

    Returns
    -------
    TokenGroups
        Over the first ``T // k * k`` tokens, ``M = T // k``; the tokens behind are left out.

    Raises
    ------
    MethodError
        If the metric has another shape or holds fewer than k tokens.
    """
    batch, tokens = _check(metric)
    if k <= 1:
        return identity_groups(batch, tokens, metric.device)
    if tokens < k:
        raise MethodError(f"runs of {k} tokens need at least {k} tokens, but there are {tokens}.")
    idx = torch.arange(tokens // k * k, device=metric.device)
    last = idx % k == k - 1
    return _merge_all(metric, idx[~last].expand(batch, -1), idx[last].expand(batch, -1), idx.numel())


def random_match(metric: Tensor, remove: int, generator: torch.Generator | None = None) -> TokenGroups:
    """Merge r random tokens into the remaining ones most similar to them.

    Parameters
    ----------
    metric : Tensor
        ``[B, T, c]``; compared by cosine.
    remove : int
        r, limited to T - 1; 0 or less changes nothing.
    generator : torch.Generator, optional
        Of the CPU, so that every device draws alike.

    Returns
    -------
    TokenGroups
        M = T - r, in ascending order of the remaining tokens.

    Raises
    ------
    MethodError
        If the metric has another shape.
    """
    batch, tokens = _check(metric)
    remove = min(remove, tokens - 1)
    if remove <= 0:
        return identity_groups(batch, tokens, metric.device)
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1).to(metric.device)
    moving, staying = (part.sort(dim=1).values for part in (order[:, :remove], order[:, remove:]))
    return _merge_all(metric, moving, staying, tokens)


def _merge_all(metric: Tensor, moving: Tensor, staying: Tensor, tokens: int) -> TokenGroups:
    units = unit_vectors(metric)
    proposers, receivers = (
        units.gather(1, part.unsqueeze(2).expand(-1, -1, units.shape[2])) for part in (moving, staying)
    )
    _, partner = _best(proposers, receivers, False, False)
    return _grouped(staying, moving, staying.gather(1, partner), tokens)


def _grouped(source: Tensor, moving: Tensor, destination: Tensor, tokens: int) -> TokenGroups:
    """Groups from the tokens that stand for outputs and those that move to one of them."""
    group = source.new_zeros(source.shape[0], tokens)
    group.scatter_(1, source, torch.arange(source.shape[1], device=source.device).expand_as(source))
    group.scatter_(1, moving, group.gather(1, destination))
    return TokenGroups(group, source)


def merge_groups(values: Tensor, groups: TokenGroups, mode: Mode = "mean") -> Tensor:
    """Reduce the tokens of every group (ToMe, step 6).

    Parameters
    ----------
    values : Tensor
        ``[B, T, C]`` (tokens beyond the groups are left out).
    groups : TokenGroups
        Partition of the tokens.
    mode : {"mean", "sum", "amax"}
        Plain mean, sum or maximum over the members.

    Returns
    -------
    Tensor
        ``[B, M, C]`` in the dtype of ``values``.

    Raises
    ------
    MethodError
        If the mode is unknown.
    """
    if mode not in get_args(Mode):
        raise MethodError(f"merge mode '{mode}' is unknown; use {', '.join(get_args(Mode))}.")
    batch, outputs = groups.source.shape
    values = values[:, : groups.group.shape[1]]
    if mode == "amax":
        index = groups.group.unsqueeze(2).expand_as(values)
        out = values.new_zeros(batch, outputs, values.shape[2])
        return out.scatter_reduce(1, index, values, "amax", include_self=False)
    start = torch.arange(batch, device=values.device).unsqueeze(1) * outputs
    target, flat = (groups.group + start).flatten(), values.flatten(0, 1)
    if mode == "mean":
        return mean_merge(flat, target, batch * outputs).unflatten(0, (batch, outputs))
    source = torch.arange(target.numel(), device=values.device)
    merge_map = MergeMap(source, target, torch.ones_like(target, dtype=torch.float32))
    return apply_merge(flat, merge_map, batch * outputs).unflatten(0, (batch, outputs))


def merge_weighted(values: Tensor, size: Tensor, groups: TokenGroups) -> tuple[Tensor, Tensor]:
    """Mean of every group weighted by sizes, and the new sizes (ToMe, step 8).

    Parameters
    ----------
    values : Tensor
        ``[B, T, C]``.
    size : Tensor
        ``[B, T]``, positive.
    groups : TokenGroups
        Partition of the T tokens.

    Returns
    -------
    merged : Tensor
        ``[B, M, C]`` in the dtype of ``values``.
    size : Tensor
        ``[B, M]``.
    """
    weights = as_float32(size).unsqueeze(2)
    total = merge_groups(weights, groups, "sum")
    merged = merge_groups(as_float32(values) * weights, groups, "sum") / total
    return merged.to(values.dtype), total.squeeze(2)


def unmerge_groups(values: Tensor, groups: TokenGroups) -> Tensor:
    """Copy each output to all tokens of its group (ToMe, step 7).

    Parameters
    ----------
    values : Tensor
        ``[B, M, C]``.
    groups : TokenGroups
        Partition of T tokens.

    Returns
    -------
    Tensor
        ``[B, T, C]``.
    """
    return values.gather(1, groups.group.unsqueeze(2).expand(-1, -1, values.shape[2]))


def chain_groups(first: TokenGroups, second: TokenGroups) -> TokenGroups:
    """The partition that two matchings make one after the other; the second one is over the outputs of the first."""
    return TokenGroups(second.group.gather(1, first.group), first.source.gather(1, second.source))
