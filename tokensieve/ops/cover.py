"""Greedy covers: keep a token, drop its neighbours, go on with the next."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_cover(near: Tensor, order: Tensor) -> Tensor:
    """Walk through tokens in a given order, keep each that is not near a kept one.

    Parameters
    ----------
    near : Tensor
        ``[B, n, n]`` bool, symmetric; entry ``[b, i, j]`` means that keeping i drops j.
    order : Tensor
        ``[B, n]`` int64, the order of the walk (a permutation of every row).

    Returns
    -------
    Tensor
        ``[B, n]`` bool, true for the kept tokens.

    Notes
    -----
    The walk is done in rounds for all tokens at once: a token without an undecided or kept earlier neighbour
    is kept, one with a kept earlier neighbour is dropped. Each round decides at least the first undecided
    token of every row; in practice a few rounds are enough.
    """
    batch, count = order.shape
    rows = order.unsqueeze(2).expand(-1, -1, count)
    columns = order.unsqueeze(1).expand(-1, count, -1)
    # earlier[b, i, j]: the i-th token of the walk is near the j-th and comes before it.
    earlier = near.gather(1, rows).gather(2, columns).triu(1).to(torch.float32)
    kept = torch.zeros(batch, count, dtype=torch.bool, device=near.device)
    undecided = torch.ones_like(kept)
    while bool(undecided.any()):
        state = torch.stack((kept, undecided), dim=1).to(earlier.dtype)
        by_kept, by_undecided = ((state @ earlier) > 0).unbind(1)
        undecided &= ~by_kept
        fresh = undecided & ~by_undecided
        kept |= fresh
        undecided &= ~fresh
    return torch.zeros_like(kept).scatter_(1, order, kept)
