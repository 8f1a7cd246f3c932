"""Greedy facility location: a subset that covers all tokens by its most similar members (CATP)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import as_float32

Rows = Callable[[Tensor], Tensor]

_BLOCK = 1 << 20
"""Similarities that are looked at together."""
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
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise MethodError(f"covering needs similarities [n, n], but the shape is {tuple(similarity.shape)}.")
    rows = as_float32(similarity)
    if rows.numel() and not float(rows.min()) >= 0:
        raise MethodError(f"covering needs similarities of at least 0, but the smallest is {float(rows.min()):.3g}.")
    columns = rows.T.contiguous()
    return greedy_cover(rows.__getitem__, columns.__getitem__, rows.new_zeros(rows.shape[0]), count, bonus)


def greedy_cover(
    rows: Rows, columns: Rows, cover: Tensor, count: int, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`greedy_facility_location` on similarities that need not be stored.

    Parameters
    ----------
    rows, columns : callable
        From token ids ``[b]`` to the similarities ``[b, n]`` with which they cover all tokens, and with which all
        tokens cover them; float32. One function where similarities are symmetric.
    cover : Tensor
        ``[n]`` how well every token is covered beforehand, float32; no more than any similarity to it for the gains
        of `greedy_facility_location`.
    count : int
        Number of tokens to choose, limited to n.
    bonus : Tensor, optional
        ``[n]`` value of a token by itself.

    Returns
    -------
    order, gains : Tensor
        As there.

    Raises
    ------
    MethodError
        If there is not one bonus per token.

    Notes
    -----
    A choice changes the gains of others only by the tokens that it covers better than those before it. Nearly all
    tokens at first, these soon are a handful; over all choices every column is read about log n times.
    """
    total, device = cover.numel(), cover.device
    if bonus is not None and bonus.shape != (total,):
        raise MethodError(f"covering needs one bonus per token, but the shape is {tuple(bonus.shape)} for {total}.")
    cover = cover.clone()
    gain = cover.new_zeros(total, dtype=torch.float64) if bonus is None else bonus.to(device).double()
    everything, block = torch.arange(total, device=device), max(1, _BLOCK // max(total, 1))
    for part in everything.split(block) if total else ():
        gain = gain + (columns(part) - cover[part].unsqueeze(1)).clamp_min_(0).sum(dim=0, dtype=torch.float64)
    order: list[int] = []
    gains: list[float] = []
    while len(order) < min(count, total):
        best = int((gain >= gain.max() - _TIE).byte().argmax())
        order.append(best)
        gains.append(float(gain[best]))
        better = torch.maximum(cover, rows(everything[best : best + 1])[0])
        changed = (better > cover).nonzero()[:, 0]
        for part in changed.split(block) if changed.numel() else ():
            before, after = cover[part].unsqueeze(1), better[part].unsqueeze(1)
            lost = torch.minimum(columns(part), after).sub_(before).clamp_min_(0)
            gain -= lost.sum(dim=0, dtype=torch.float64)
        cover, gain[best] = better, float("-inf")
    return (
        torch.tensor(order, dtype=torch.int64, device=device),
        torch.tensor(gains, dtype=torch.float32, device=device),
    )
