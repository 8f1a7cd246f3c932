"""Attention statistics from q and k, without ever storing a full attention matrix.

All functions take queries ``[B, H, N, d]`` and keys ``[B, H_kv, N, d]`` after any rotary embedding, repeat
key heads for grouped queries, and take the softmax in float32, as the eager kernels of common libraries do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from tokensieve.errors import MethodError
from tokensieve.ops.similarity import as_float32

DEFAULT_MAX_BYTES = 64 * 1024 * 1024
_COPIES = 3
"""Buffers of the size of the logits that live at the same time: the logits, their softmax and a mask."""


def _default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled logits ``[B, H, Q, K]`` of q ``[B, H, Q, d]`` and k ``[B, H_kv, K, d]`` without repeating k."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if heads % kv_heads:
        raise MethodError(f"{heads} query heads cannot share {kv_heads} key heads; the first must be a multiple.")
    grouped = (as_float32(q) * scale).reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    return (grouped @ as_float32(k).transpose(-1, -2)).reshape(batch, heads, queries, keys)


def _chunks(
    batch: int, queries: int, bytes_per_query: int, limit: int, fixed: int | None
) -> Iterator[tuple[slice, slice]]:
    """Slices over batch and queries whose logits stay below the limit; items go together if they fit."""
    rows = max(1, limit // bytes_per_query) if fixed is None else max(1, fixed)
    items = max(1, rows // queries) if fixed is None else batch
    rows = min(rows, queries)
    for first in range(0, batch, items):
        for start in range(0, queries, rows):
            yield slice(first, first + items), slice(start, start + rows)


def _summed_attention(
    q: Tensor, k: Tensor, positions: Tensor | None, scale: float, fixed: int | None, limit: int
) -> Tensor:
    """Attention ``[B, H, K]`` summed over queries; ``positions`` [Q] are the last visible keys if causal."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    total = torch.zeros(batch, heads, keys, dtype=as_float32(q[:0]).dtype, device=q.device)
    key_positions = torch.arange(keys, device=q.device)
    for items, rows in _chunks(batch, queries, _COPIES * 4 * heads * keys, limit, fixed):
        logits = _logits(q[items, :, rows], k[items], scale)
        if positions is not None:
            logits.masked_fill_(key_positions > positions[rows].unsqueeze(1), float("-inf"))
        total[items] += logits.softmax(dim=-1).sum(dim=2)
    return total


def received_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    queries_per_chunk: int | None = None,
    segments: Tensor | Sequence[int] | None = None,
    reduce_heads: bool = True,
    reduce_queries: Literal["mean", "sum"] = "mean",
    query_rows: slice | Literal["all"] = "all",
    causal: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor:
    """Attention that each key receives, over heads and queries.

    Parameters
    ----------
    q : Tensor
        ``[B, H, N, d]`` queries.
    k : Tensor
        ``[B, H_kv, N, d]`` keys; H must be a multiple of H_kv.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    queries_per_chunk : int, optional
        Queries handled at once; by default as many as ``max_bytes`` allows.
    segments : Tensor or sequence of int, optional
        ``[S+1]`` boundaries from 0 to N (the ``cu_seqlens`` of variable-length encoders). Queries then only
        see keys of their own segment, and the mean is over the queries of that segment.
    reduce_heads : bool
        Average over heads; if false the result keeps a head axis.
    reduce_queries : {"mean", "sum"}
        Mean or sum over queries.
    query_rows : slice or "all"
        Which queries count; the mean is over these. Not together with ``segments``.
    causal : bool
        Query i sees keys up to ``i + (keys - queries)`` only. Keys that no query can see receive 0.
    max_bytes : int
        Upper bound of the memory for one chunk of logits and its copies (at least one query is always
        handled).

    Returns
    -------
    Tensor
        ``[B, N]``, or ``[B, H, N]`` without ``reduce_heads``; float32 (float64 for float64 input).

    Raises
    ------
    MethodError
        If the head counts do not match, no query is selected, or ``segments`` is malformed or combined with
        ``query_rows`` or ``causal``.
    """
    scale = _default_scale(q, scale)
    if segments is not None:
        if query_rows != "all" or causal:
            raise MethodError("attention inside segments cannot be limited by query_rows or causal; drop one of them.")
        lengths = _segment_lengths(segments, k.shape[2])
        summed = _segmented(q, k, lengths, scale, queries_per_chunk, max_bytes, reduce_queries == "mean")
    else:
        first_visible = k.shape[2] - q.shape[2]
        positions = torch.arange(q.shape[2], device=q.device) + first_visible
        if query_rows != "all":
            q, positions = q[:, :, query_rows], positions[query_rows]
        if q.shape[2] == 0:
            raise MethodError(f"query_rows {query_rows} selects no query; choose at least one.")
        summed = _summed_attention(q, k, positions if causal else None, scale, queries_per_chunk, max_bytes)
        if reduce_queries == "mean":
            summed /= q.shape[2]
    return summed.mean(dim=1) if reduce_heads else summed


def _segment_lengths(segments: Tensor | Sequence[int], count: int) -> list[int]:
    bounds: list[int] = segments.tolist() if isinstance(segments, Tensor) else list(segments)
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != count or min(lengths) < 0:
        raise MethodError(
            f"segment boundaries must rise from 0 to the {count} tokens, but they run from {bounds[:1]} "
            f"to {bounds[-1:]}; pass cumulative lengths."
        )
    return lengths


def _segmented(
    q: Tensor, k: Tensor, lengths: list[int], scale: float, fixed: int | None, limit: int, mean: bool
) -> Tensor:
    """Received attention ``[B, H, N]`` inside segments; segments of one length are handled as one batch."""
    batch, heads, count, dim = q.shape
    out = torch.zeros(batch, heads, count, dtype=as_float32(q[:0]).dtype, device=q.device)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    for length in sorted(set(lengths) - {0}):
        # Groups of segments are gathered at once, but no more than the limit holds next to their logits.
        group = max(1, limit // (4 * batch * heads * length * (_COPIES * length + 2 * dim)))
        for part in starts[sizes == length].to(q.device).split(group):
            idx = part.unsqueeze(1) + torch.arange(length, device=q.device)
            inside_q, inside_k = (x[:, :, idx].transpose(1, 2).flatten(0, 1) for x in (q, k))
            summed = _summed_attention(inside_q, inside_k, None, scale, fixed, limit)
            summed = summed.unflatten(0, (batch, -1)).transpose(1, 2)
            out[:, :, idx] = summed / length if mean else summed
    return out


def class_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, class_index: int = 0, reduce_heads: bool = True
) -> Tensor:
    """Attention of the class token to all tokens.

    Parameters
    ----------
    q, k : Tensor
        ``[B, H, N, d]`` and ``[B, H_kv, N, d]``, class token included.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    class_index : int
        Place of the class token.
    reduce_heads : bool
        Average over heads; if false the result keeps a head axis.

    Returns
    -------
    Tensor
        ``[B, N]`` (or ``[B, H, N]``), the class token's own column included; float32 (float64 for float64).
    """
    row = q.narrow(2, class_index, 1)
    attention = _logits(row, k, _default_scale(q, scale)).softmax(dim=-1)[:, :, 0]
    return attention.mean(dim=1) if reduce_heads else attention


def last_query_attention(
    q_last: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    reduce_heads: bool = True,
) -> Tensor:
    """Attention of the last prompt token to all tokens, the importance score of FastV and its successors.

    Parameters
    ----------
    q_last : Tensor
        ``[B, H, 1, d]`` query of the last real token of each row, rotated.
    k : Tensor
        ``[B, H_kv, L, d]`` rotated keys.
    mask : Tensor, optional
        ``[B, L]`` bool or 0/1, false at padding (which then gets exactly 0).
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    reduce_heads : bool
        Average over heads; if false the result keeps a head axis.

    Returns
    -------
    Tensor
        ``[B, L]`` (or ``[B, H, L]``), rows summing to 1; float32 (float64 for float64 input).
    """
    logits = _logits(q_last, k, _default_scale(q_last, scale))[:, :, 0]
    if mask is not None:
        logits = logits.masked_fill(~mask.bool().unsqueeze(1), float("-inf"))
    attention = logits.softmax(dim=-1)
    return attention.mean(dim=1) if reduce_heads else attention


def query_attention(q: Tensor, k: Tensor, mask: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of some queries to all tokens, head by head.

    Parameters
    ----------
    q : Tensor
        ``[B, H, r, d]`` rotated queries.
    k : Tensor
        ``[B, H_kv, L, d]`` rotated keys.
    mask : Tensor
        ``[B, r, L]`` bool, true where a query may look; every query must see at least one key.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.

    Returns
    -------
    Tensor
        ``[B, H, r, L]``, rows summing to 1; float32 (float64 for float64 input).
    """
    logits = _logits(q, k, _default_scale(q, scale))
    return logits.masked_fill(~mask.bool().unsqueeze(1), float("-inf")).softmax(dim=-1)
