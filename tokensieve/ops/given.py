"""Attention that tokens give to all others but one, without ever storing a full attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.attention import DEFAULT_MAX_BYTES
from tokensieve.ops.similarity import as_float32

_COPIES = 2
"""Buffers of the size of the logits that live at the same time."""


def given_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    class_index: int = 0,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """Attention that every token gives to the patches, as a mean over heads and patches.

    Rows of an attention matrix sum to 1, so this is what the class token's column leaves over.

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, N, d]`` and ``[B, H_kv, N, d]``, class token included; H must be a multiple of H_kv.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    class_index : int
        Place of the class token.
    max_bytes : int
        Upper bound of the memory for one chunk of logits and its copies.

    Returns
    -------
    Tensor
        ``[B, N]``, ``(1 - A[i, class]) / (N - 1)``, the class token's own row included; float32 (float64 for
        float64 input).

    Raises
    ------
    MethodError
        If there is nothing but a class token, or the head counts do not match.
    """
    batch, heads, count, dim = q.shape
    kv_heads = k.shape[1]
    if count < 2 or heads % kv_heads:
        raise MethodError(
            f"given attention needs patches beside the class token and query heads that share key heads, but there "
            f"are {count} tokens, {heads} query and {kv_heads} key heads."
        )
    keys = as_float32(k).transpose(-1, -2)
    queries = as_float32(q).view(batch, kv_heads, heads // kv_heads, count, dim)
    factor = dim**-0.5 if scale is None else scale
    out = torch.empty(batch, count, dtype=queries.dtype, device=q.device)
    rows = max(1, max_bytes // (_COPIES * 4 * heads * count))
    for item in range(batch):
        for part in torch.arange(count, device=q.device).split(rows):
            logits = (queries[item, :, :, part] * factor) @ keys[item].unsqueeze(1)
            share = torch.exp(logits[..., class_index] - logits.logsumexp(dim=-1))
            out[item, part] = (1 - share.flatten(0, 1).mean(dim=0)) / (count - 1)
    return out
