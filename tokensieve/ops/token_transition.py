"""How much a module of a layer rewrites each token (token transition variation of TransPrune)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.ops.similarity import as_float32

EPSILON = 1e-8
"""Lower bound of norms."""


def token_transition(before: Tensor, after: Tensor) -> Tensor:
    """Change of length times share of the change of direction (step 1).

    Parameters
    ----------
    before, after : Tensor
        ``[..., S, D]`` input and output of an attention module or MLP, the residual left out.

    Returns
    -------
    Tensor
        ``[..., S]`` float32: ``|y| / |x|`` times the softmax over the sequence of ``1 - cos(x, y)``.
    """
    before, after = as_float32(before), as_float32(after)
    old, new = (states.norm(dim=-1).clamp_min(EPSILON) for states in (before, after))
    cosine = torch.linalg.vecdot(before, after) / (old * new)
    return new / old * (1 - cosine).softmax(dim=-1)


def transition_score(transition: Tensor, attention: Tensor, alpha: float = 0.5) -> Tensor:
    """Score of visual tokens from what they went through and what the text attends to (step 2).

    Parameters
    ----------
    transition : Tensor
        ``[n]`` transitions, added up over layers.
    attention : Tensor
        ``[T, n]`` attention of the text behind the visual tokens, mean over heads.
    alpha : float
        Weight of the transitions; the attention weighs the rest.

    Returns
    -------
    Tensor
        ``[n]``; both parts are divided by their sums.
    """
    guided = attention.mean(dim=0) if attention.shape[0] else attention.new_zeros(attention.shape[1])
    parts = (part / (part.sum() + EPSILON) for part in (transition.to(guided), guided))
    moved, attended = parts
    return alpha * moved + (1 - alpha) * attended
