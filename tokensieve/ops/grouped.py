"""Top-k inside groups of different sizes, in one sort (views of an item, frames of a prompt)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.select import top_indices


def top_in_groups(scores: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Ids of the largest scores of every group.

    Parameters
    ----------
    scores : Tensor
        ``[n]``. NaN ranks last.
    group : Tensor
        ``[n]`` int64 group of every score, in ``0..G-1``, in any order.
    counts : Tensor
        ``[G]`` int64 number to take from each group, limited to its size.

    Returns
    -------
    Tensor
        ``[M]`` int64 ids, ascending, on the device of ``scores``. Among equal scores the lowest id comes first.

    Raises
    ------
    MethodError
        If scores and groups do not match, or a group has no count.
    """
    if scores.dim() != 1 or group.shape != scores.shape:
        raise MethodError(
            f"choosing inside groups needs one group per score, but the scores have shape {tuple(scores.shape)} "
            f"and the groups {tuple(group.shape)}."
        )
    if scores.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    group, counts = group.to(scores.device), counts.to(scores.device)
    if int(group.max()) >= counts.numel():
        raise MethodError(f"group {int(group.max())} has no count; {counts.numel()} counts were given.")
    ranked = top_indices(scores, scores.numel(), order="rank")
    ranked = ranked[group[ranked].sort(stable=True).indices]
    sizes = torch.bincount(group, minlength=counts.numel())
    owner = group[ranked]
    rank = torch.arange(ranked.numel(), device=scores.device) - (sizes.cumsum(0) - sizes)[owner]
    return ranked[rank < counts[owner]].sort().values
