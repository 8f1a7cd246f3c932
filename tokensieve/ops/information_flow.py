"""Scores from the information flow of an encoder layer, and how many patches it drops (FlowCut)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import as_float32

_LOG_GUARD = 1e-7


def semantic_attention(values: Tensor, query: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Likeness of value vectors to one value vector, as a softmax (step 2b; B for the LLM).

    Parameters
    ----------
    values : Tensor
        ``[B, H, n, d]``.
    query : Tensor, optional
        ``[B, H, d]`` the value compared with; by default the first of ``values`` (the class token), which
        takes part in the softmax and is then left out of the result.
    scale : float
        Factor of the dot products: 1 in the encoder, ``d ** -0.5`` in the LLM.

    Returns
    -------
    Tensor
        ``[B, n]`` (``[B, n-1]`` without ``query``), mean over heads, float32.
    """
    values = as_float32(values)
    first = values[:, :, 0] if query is None else as_float32(query)
    share = (torch.einsum("bhd,bhnd->bhn", first, values) * scale).softmax(dim=-1).mean(dim=1)
    return share[:, 1:] if query is None else share


def flow_scores(attention: Tensor, semantic: Tensor | None, values: Tensor, normalise: bool = True) -> Tensor:
    """Importance of every patch in one layer, ``(c / sum c + g / sum g) * |v|_1`` (steps 2c and 2d).

    Parameters
    ----------
    attention : Tensor
        ``[B, n]`` attention of the class token (of the mean query, or of the last prompt token), mean over
        heads.
    semantic : Tensor, optional
        ``[B, n]`` from `semantic_attention`; None leaves the term out (Qwen towers, C).
    values : Tensor
        ``[B, n, d]`` value vectors averaged over heads.
    normalise : bool
        Divide both terms by their sums; the Qwen forms take them as they are.

    Returns
    -------
    Tensor
        ``[B, n]`` float32.

    Raises
    ------
    MethodError
        If the shapes do not match.
    """
    if attention.shape != values.shape[:2] or (semantic is not None and semantic.shape != attention.shape):
        raise MethodError(
            f"flow scores need attention [B, n], likeness [B, n] and values [B, n, d], but the shapes are "
            f"{tuple(attention.shape)}, {None if semantic is None else tuple(semantic.shape)} and "
            f"{tuple(values.shape)}."
        )
    terms = [as_float32(term) for term in (attention, semantic) if term is not None]
    if normalise:
        terms = [term / term.sum(dim=-1, keepdim=True) for term in terms]
    return sum(terms[1:], terms[0]) * as_float32(values).abs().sum(dim=-1)


def prune_counts(attention: Tensor, remaining: int, target: int, normalise: bool = True) -> Tensor:
    """Patches that each sample alone would drop in one pruning layer (step 2f).

    Parameters
    ----------
    attention : Tensor
        ``[B, n]`` attention of the class token, mean over heads.
    remaining : int
        Layers left until the last pruning layer, 0 in that layer itself.
    target : int
        Patches to keep in the end, at least 1.
    normalise : bool
        Divide by the sum first; the Qwen form does not, and adds 1e-7 inside the logarithm.

    Returns
    -------
    Tensor
        ``[B]`` int64, ``round((n - T) / sqrt(rem) * (1 - e^2))`` with e the entropy relative to its largest
        value; ``n - T`` in the last pruning layer. The published batch rule takes the largest for all samples.

    Raises
    ------
    MethodError
        If ``target`` is below 1 or ``remaining`` negative.
    """
    if target < 1 or remaining < 0:
        raise MethodError(
            f"cannot prune to {target} patches with {remaining} layers left; keep at least 1 patch and count layers "
            "from 0."
        )
    surplus = attention.shape[-1] - target
    if surplus <= 0:
        return torch.zeros(attention.shape[0], dtype=torch.int64, device=attention.device)
    if remaining == 0:
        return torch.full((attention.shape[0],), surplus, device=attention.device)
    share = as_float32(attention)
    if normalise:
        share = share / share.sum(dim=-1, keepdim=True)
        entropy = -torch.xlogy(share, share).sum(dim=-1)
    else:
        entropy = -(share * (share + _LOG_GUARD).log()).sum(dim=-1)
    relative = entropy / math.log(attention.shape[-1])
    return torch.round(surplus / math.sqrt(remaining) * (1 - relative.square())).long().clamp(0, surplus)


def mean_query_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention of the mean query of a picture to its patches, for towers without class token (C).

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, n, d]`` behind the rotary embedding.

    Returns
    -------
    Tensor
        ``[B, n]`` mean over heads, float32.
    """
    query = as_float32(q).mean(dim=2)
    logits = torch.einsum("bhd,bhnd->bhn", query, as_float32(k)) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1).mean(dim=1)
