"""Attention received from the most attended tokens only, without the full attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.attention import DEFAULT_MAX_BYTES, received_attention
from tokensieve.ops.similarity import as_float32


def focus_mask(received: Tensor, threshold: float) -> Tensor:
    """Tokens that receive more than ``threshold`` times the mean attention.

    Parameters
    ----------
    received : Tensor
        ``[B, N]`` attention that every token receives, mean over heads and queries.
    threshold : float
        Multiple of the mean over the N tokens; 0 or more.

    Returns
    -------
    Tensor
        ``[B, N]`` bool; all tokens in rows where none exceeds the threshold.

    Raises
    ------
    MethodError
        If the threshold is negative.
    """
    if not threshold >= 0:
        raise MethodError(f"threshold is {threshold}, but it is a multiple of the mean attention; use 0 or more.")
    mask = received > threshold * received.mean(dim=-1, keepdim=True)
    return mask | ~mask.any(dim=-1, keepdim=True)


def focused_mean(attention: Tensor, threshold: float) -> Tensor:
    """Mean attention that every token receives from the most attended tokens, from a full map.

    Parameters
    ----------
    attention : Tensor
        ``[B, N, N]`` softmax maps, queries by keys, mean over heads.
    threshold : float
        See `focus_mask`.

    Returns
    -------
    Tensor
        ``[B, N]`` float32 (float64 for float64 input).
    """
    attention = as_float32(attention)
    mask = focus_mask(attention.mean(dim=1), threshold).to(attention.dtype)
    return torch.einsum("bq,bqk->bk", mask / mask.sum(dim=-1, keepdim=True), attention)


def focused_attention(
    q: Tensor,
    k: Tensor,
    threshold: float,
    *,
    scale: float | None = None,
    skip: int = 0,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """`focused_mean` from queries and keys: once over all queries in chunks, then over the attended ones.

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, N, d]`` and ``[B, H_kv, N, d]``, one picture per batch element.
    threshold : float
        See `focus_mask`.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    skip : int
        Tokens in front (a class token) that are looked at but do not look, and are left out of the result.
    max_bytes : int
        Upper bound of the memory for one chunk of logits.

    Returns
    -------
    Tensor
        ``[B, N - skip]`` float32 (float64 for float64 input).
    """
    q = q[:, :, skip:]
    mask = focus_mask(received_attention(q, k, scale=scale, max_bytes=max_bytes)[:, skip:], threshold)
    rows = [
        received_attention(q[i : i + 1, :, chosen], k[i : i + 1], scale=scale, max_bytes=max_bytes)
        for i, chosen in enumerate(mask)
    ]
    return torch.cat(rows)[:, skip:]
