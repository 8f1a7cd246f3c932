"""Taking tokens out of the caches of layers that have already run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokensieve.core.compactor import pad_rows
from tokensieve.core.ledger import Span


def evict(cache: Any, span: Span, layers: range, dropped: list[Tensor]) -> Span:
    """Remove entries from consecutive caches of one length.

    Caches that grow lose the entries. Others (preallocated, quantized) keep them as padding, which nobody attends to.

    Parameters
    ----------
    cache
        The model's cache.
    span : Span
        What these layers hold; it must know its visual entries.
    layers
        The layers, all of which have run.
    dropped : list of Tensor
        Visual numbers to remove, row by row.

    Returns
    -------
    Span
        What the layers hold now.
    """
    assert span.visual is not None
    gone = torch.stack([torch.isin(span.visual[row], numbers) for row, numbers in enumerate(dropped)])
    keep = span.real & ~gone
    if cache is None or not all(_is_plain(cache.layers[layer], span.real.shape[1]) for layer in layers):
        return Span(keep, span.removed, span.offset, span.visual.masked_fill(gone, -1))
    rows = [row.nonzero().flatten() for row in keep]
    moved = pad_rows(rows, keep.shape[1], bool(span.real[:, -1].all()))
    for layer in layers:
        held = cache.layers[layer]
        held.keys, held.values = _gathered(held.keys, moved.index), _gathered(held.values, moved.index)
    visual = span.visual.gather(1, moved.index).masked_fill(~moved.real, -1)
    return Span(moved.real, span.removed + moved.removed, span.offset, visual)


def _is_plain(layer: Any, length: int) -> bool:
    """Whether a cache layer is nothing but keys and values that grow."""
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or getattr(layer, "max_cache_len", None) is not None:
        return False
    return not getattr(layer, "is_sliding", False) and keys.shape[-2] == length == int(layer.get_seq_length())


def _gathered(states: Tensor, index: Tensor) -> Tensor:
    """Entries of ``states [B, H, P, d]`` at ``index [B, P']``."""
    places = index.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, places)
