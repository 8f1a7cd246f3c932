"""Attention masks and rotary tables of compacted sequences, in the form that the model's layers want."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokensieve.core.cache import name_of_cache


class _Past:
    """The part of the cache interface that mask creation reads, for a known number of cached tokens."""

    is_compileable = False
    is_sliding = (False,)
    is_linear = (False,)
    is_dummy = (False,)

    def __init__(self, length: int, width: int | None) -> None:
        self.length = length
        self.width = width

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int | None = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int | None = 0) -> tuple[int, int]:
        return self.width or self.length + query_length, 0


def causal_mask(config: Any, hidden: Tensor, real: Tensor, cache: Any = None, layer: int = 0) -> Any:
    """Causal mask for queries ``hidden [B, q, D]`` that end a key sequence with padding mask ``real [B, kv]``.

    With a preallocated cache the mask is as wide as the layer's buffer.
    """
    from transformers.masking_utils import create_causal_mask

    past = _Past(real.shape[1] - hidden.shape[1], _buffer_width(cache, layer))
    arguments: dict[str, Any] = {name_of_cache(create_causal_mask): past}
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=real.to(hidden.device),
        position_ids=None,
        **arguments,
    )


def is_preallocated(cache: Any) -> bool:
    """Whether the cache hands out whole buffers, of which only the first entries are filled."""
    return _buffer_width(cache, 0) is not None


def _buffer_width(cache: Any, layer: int) -> int | None:
    """Entries of a preallocated cache layer; None for caches that grow."""
    if cache is None or len(cache.layers) <= layer:
        return None
    return getattr(cache.layers[layer], "max_cache_len", None)


def padding_mask(mask: Any, batch: int, total: int) -> Tensor | None:
    """The 2-d padding mask [B, total] on the CPU behind any mask that a caller may hand over; None for none.

    Prepared 4-d masks (compiled caches) are read off their last query row.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if mask.ndim == 4:
        row = mask[:, 0, -1, :total]
        mask = row if row.dtype == torch.bool else row == 0
    return mask[:, -total:].to(device="cpu", dtype=torch.bool).expand(batch, -1)


def shifted_tables(text_model: Any, positions: Tensor, offset: Tensor | int, hidden: Tensor) -> Any:
    """Rotary tables for ``positions`` in layers that count them lower by ``offset``."""
    lower = positions - (offset if isinstance(offset, int) else offset.to(positions.device))
    return text_model.rotary_emb(hidden, lower.to(hidden.device))


def on_device(swap: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The replaced arguments on the device of the layer that is about to run."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(move(part) for part in value) if isinstance(value, tuple) else value

    return {key: move(value) for key, value in swap.items()}
