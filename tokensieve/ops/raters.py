"""Text tokens that judge visual tokens (SparseVLM): who they are, and how they score."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32

SMALLEST_BIAS = 1e-3
"""Lower bound of the magnitude by which attention is divided."""

_log = logging.getLogger(__name__)


def text_relevance(visual: Tensor, text: Tensor) -> Tensor:
    """How much the visual tokens as a whole look at each text token.

    Parameters
    ----------
    visual : Tensor
        ``[V, D]`` visual inputs of the LLM.
    text : Tensor
        ``[T, D]`` embeddings of the text behind them.

    Returns
    -------
    Tensor
        ``[T]`` float32, summing to 1: softmax over the text of the raw dot products, mean over the visual tokens.
    """
    return (as_float32(visual) @ as_float32(text).T).softmax(dim=-1).mean(dim=0)


def text_raters(relevance: Tensor) -> Tensor:
    """Text tokens above the mean relevance; all of them when none is.

    Parameters
    ----------
    relevance : Tensor
        ``[T]``.

    Returns
    -------
    Tensor
        Ascending int64 ids.
    """
    above = (relevance > relevance.mean()).nonzero()[:, 0]
    return above if above.numel() else torch.arange(relevance.numel(), device=relevance.device)


def rater_attention(attention: Tensor, raters: Tensor, bias: Tensor | None = None, heads: int | None = None) -> Tensor:
    """Attention of the raters to the visual tokens, mean over heads.

    Parameters
    ----------
    attention : Tensor
        ``[H, T, v]`` attention of the text tokens to the visual tokens, a part of full attention rows.
    raters : Tensor
        ``[r]`` ids of text tokens.
    bias : Tensor, optional
        ``[T, v]`` product of two vectors of ones at the positions of both tokens; the attention is divided by it
        (version 2.0). Magnitudes below 0.001 count as 0.001, which is logged.
    heads : int, optional
        Average only over this many heads with the largest attention of raters to visual tokens (version 2.0).

    Returns
    -------
    Tensor
        ``[r, v]``.
    """
    rows = attention.index_select(1, raters.to(attention.device))
    if bias is not None:
        divisor = bias.to(rows).index_select(0, raters.to(rows.device))
        small = divisor.abs() < SMALLEST_BIAS
        if bool(small.any()):
            _log.warning("The position bias vanishes for %d pairs of tokens; it is held at 0.001.", int(small.sum()))
        rows = rows / torch.where(small, torch.full_like(divisor, SMALLEST_BIAS).copysign(divisor), divisor)
    if heads is not None and heads < rows.shape[0]:
        rows = rows.index_select(0, top_indices(rows.sum(dim=(1, 2)), heads))
    return rows.mean(dim=0)


def rank_count(attention: Tensor, scale: float, bias: float) -> int | None:
    """Number of visual tokens to keep, by the rank of the raters' attention (version 1.0).

    Parameters
    ----------
    attention : Tensor
        ``[r, v]`` attention of the raters.
    scale, bias : float
        Published pairs are (13.5, 0), (9, 6) and (0.8, 0).

    Returns
    -------
    int or None
        ``min(int(rank * scale + bias), v - 1)``, at least 1; None when the rank leaves nothing to prune.
    """
    visual = attention.shape[1]
    rank = int(torch.linalg.matrix_rank(as_float32(attention)))
    if rank >= visual:
        return None
    return max(1, min(int(rank * scale + bias), visual - 1))
