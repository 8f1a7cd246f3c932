"""Greedy facility location: a subset that covers all tokens by its most similar members (CATP)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import as_float32

_BATCH = 16
_TIE = 1e-6
"""Gains closer than this are ties: two tokens that are each other's best cover gain exactly the same, up to the
rounding of the similarities, and the lower index must win everywhere."""


def greedy_facility_location(similarity: Tensor, count: int, bonus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose tokens one by one, each with the largest gain in ``sum_x max_{y chosen} s(y, x) + sum bonus``.

    Parameters
    ----------
    similarity : Tensor
        ``[n, n]``, not negative; row y is how well token y covers every token.
    count : int
        Number of tokens to choose, limited to n.
    bonus : Tensor, optional
        ``[n]`` value of a token by itself.

    Returns
    -------
    order : Tensor
        ``[count]`` int64 in the order of the choice; the lowest index wins ties.
    gains : Tensor
        ``[count]`` float32 gain of each choice.

    Raises
    ------
    MethodError
        If the shapes do not match or a similarity is negative.

    Notes
    -----
    Gains only shrink as the cover grows, so an old gain is an upper bound of the present one: tokens are evaluated
    anew, a few at a time, until the best one is up to date. The result is that of evaluating all of them.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise MethodError(f"covering needs similarities [n, n], but the shape is {tuple(similarity.shape)}.")
    total = similarity.shape[0]
    if bonus is not None and bonus.shape != (total,):
        raise MethodError(f"covering needs one bonus per token, but the shape is {tuple(bonus.shape)} for {total}.")
    rows = as_float32(similarity)
    if total and not float(rows.min()) >= 0:
        raise MethodError(f"covering needs similarities of at least 0, but the smallest is {float(rows.min()):.3g}.")
    count = min(max(count, 0), total)
    value = rows.new_zeros(total, dtype=torch.float64) if bonus is None else bonus.to(rows.device).double()
    bound = rows.sum(dim=1, dtype=torch.float64) + value
    cover = rows.new_zeros(total)
    order: list[int] = []
    gains: list[float] = []
    fresh = torch.ones(total, dtype=torch.bool, device=rows.device)
    while len(order) < count:
        near = bound >= bound.max() - _TIE
        if bool((near & ~fresh).any()):
            idx = bound.masked_fill(fresh, float("-inf")).topk(min(_BATCH, total)).indices
            idx = idx[~fresh[idx]]
            bound[idx] = (rows[idx] - cover).clamp_min_(0).sum(dim=1, dtype=torch.float64) + value[idx]
            fresh[idx] = True
            continue
        best = int(near.long().argmax())
        order.append(best)
        gains.append(float(bound[best]))
        cover = torch.maximum(cover, rows[best])
        bound[best] = float("-inf")
        fresh.fill_(False)
        fresh[order] = True
    return (
        torch.tensor(order, dtype=torch.int64, device=rows.device),
        torch.tensor(gains, dtype=torch.float32, device=rows.device),
    )
