"""Attention by plain matrix products, for training on CPUs.

The fused kernel of PyTorch saves memory, but in bf16 its backward pass takes several times as long as two matrix
products do on a CPU; the sequences of the world are short enough to keep the probabilities.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "tokensieve_products"

_CHUNK = 192


def products(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: tuple[int, int, int] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention over ``[B, H, T, d]``, returned as ``[B, T, H, d]``.

    Without ``layout`` every position sees every other. ``layout = (P, K, L)`` stands for a causal prefix of ``P``
    positions followed by ``K`` turns of ``L``; each turn sees the prefix and itself up to the present.
    """
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if layout is None:
        return ((query @ key.transpose(-1, -2)).softmax(-1) @ value).transpose(1, 2), None
    dtype = value.dtype
    found: torch.Tensor = TurnAttention.apply(query.to(dtype), key.to(dtype), value, layout)
    return found.transpose(1, 2), None


class TurnAttention(torch.autograd.Function):
    """Attention of a causal prefix and turns that see the prefix and themselves.

    Written with its own backward pass, because the one that autograd would build fills a buffer of zeros for every
    slice and spends most of its time in the backward pass of softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: tuple[int, int, int]
    ) -> torch.Tensor:
        """Output ``[B, H, T, d]`` of scaled queries, keys and values ``[B, H, T, d]``."""
        out = torch.empty_like(query)
        shares = []
        for begin, stop in _chunks(layout[0]):
            scores = query[..., begin:stop, :] @ key[..., :stop, :].transpose(-1, -2)
            scores[..., begin:] += _future(stop - begin, scores.dtype)
            shares.append(scores.softmax(-1))
            out[..., begin:stop, :] = shares[-1] @ value[..., :stop, :]
        size, number, length = layout
        mine, keys, values = (states[..., size:, :].unflatten(-2, (number, length)) for states in (query, key, value))
        before = query[..., size:, :] @ key[..., :size, :].transpose(-1, -2)
        own = mine @ keys.transpose(-1, -2) + _future(length, query.dtype)
        together = torch.cat([before, own.flatten(-3, -2)], -1).softmax(-1)
        from_own = together[..., size:].unflatten(-2, (number, length)) @ values
        out[..., size:, :] = together[..., :size] @ value[..., :size, :] + from_own.flatten(-3, -2)
        ctx.layout = layout
        ctx.save_for_backward(query, key, value, out, together, *shares)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query, key, value, out, together, *shares = ctx.saved_tensors
        size, number, length = ctx.layout
        delta = (grad * out).sum(-1, keepdim=True)
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (begin, stop), share in zip(_chunks(size), shares, strict=True):
            part = grad[..., begin:stop, :]
            d_value[..., :stop, :] += share.transpose(-1, -2) @ part
            d_scores = (part @ value[..., :stop, :].transpose(-1, -2)).sub_(delta[..., begin:stop, :]).mul_(share)
            d_query[..., begin:stop, :] = d_scores @ key[..., :stop, :]
            d_key[..., :stop, :] += d_scores.transpose(-1, -2) @ query[..., begin:stop, :]

        part, offset = grad[..., size:, :], delta[..., size:, :]
        share = together[..., :size]
        d_value[..., :size, :] += share.transpose(-1, -2) @ part
        d_scores = (part @ value[..., :size, :].transpose(-1, -2)).sub_(offset).mul_(share)
        d_query[..., size:, :] = d_scores @ key[..., :size, :]
        d_key[..., :size, :] += d_scores.transpose(-1, -2) @ query[..., size:, :]

        def turns(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-2, (number, length))

        share, part, offset = turns(together[..., size:]), turns(part), turns(offset)
        d_value[..., size:, :] += (share.transpose(-1, -2) @ part).flatten(-3, -2)
        d_scores = (part @ turns(value[..., size:, :]).transpose(-1, -2)).sub_(offset).mul_(share)
        d_query[..., size:, :] += (d_scores @ turns(key[..., size:, :])).flatten(-3, -2)
        d_key[..., size:, :] += (d_scores.transpose(-1, -2) @ turns(query[..., size:, :])).flatten(-3, -2)
        return d_query, d_key, d_value, None


def _chunks(size: int) -> list[tuple[int, int]]:
    """Queries in chunks, each against the keys up to its own end: half of the products are never needed."""
    return [(begin, min(begin + _CHUNK, size)) for begin in range(0, size, _CHUNK)]


@lru_cache(maxsize=64)
def _future(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask ``[size, size]``."""
    return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(NAME, products)
AttentionMaskInterface.register(NAME, _no_mask)
