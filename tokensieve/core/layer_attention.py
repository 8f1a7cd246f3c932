"""Attention of one decoder layer, recomputed for the rows that somebody asks about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokensieve.errors import HostError
from tokensieve.hosts.base import Host
from tokensieve.ops.attention import query_attention
from tokensieve.ops.attention_walk import walk_importance

Tables = tuple[Tensor, Tensor]
ROWS = 256
"""Query rows handled at once where only sums over them are wanted."""


@dataclass
class LayerAttention:
    """Queries and keys of one prompt row in one decoder layer.

    Attributes
    ----------
    host
        The family, which knows the rotary embedding.
    module
        Attention of the layer.
    hidden : Tensor [1, L, D]
        What its projections read.
    tables
        Rotary tables of the row, [1, L, d] each.
    visible : Tensor [P + L]
        Keys that may be attended to at all.
    cache, row
        The model's cache and the row in it, for keys of earlier turns.
    ahead
        The layer has not run yet, so that its cache holds earlier turns at most.
    """

    host: Host
    module: Any
    hidden: Tensor
    tables: Tables
    visible: Tensor
    cache: Any
    row: int
    ahead: bool = False

    @property
    def past(self) -> int:
        """Keys of earlier turns in front of the present sequence."""
        return self.visible.numel() - self.hidden.shape[1]

    def keys(self) -> Tensor:
        """Rotated keys [1, H_kv, P + L, d]: from the cache where it holds them, or projected again."""
        cached = None if self.ahead else cached_keys(self.cache, self.module.layer_idx, self.visible.numel())
        if cached is not None:
            return cached[self.row : self.row + 1].to(self.hidden.device)
        k = project(self.module, "k", self.hidden)
        k = self.host.decoder_rotary(self.module)(k, k, *self.tables)[1]
        if self.past == 0:
            return k
        before = cached_keys(self.cache, self.module.layer_idx, self.past)
        if before is None:
            raise unreadable_cache()
        return torch.cat((before[self.row : self.row + 1].to(k), k), dim=2)

    def queries(self, rows: Tensor) -> Tensor:
        """Rotated queries [1, H, r, d] of the tokens ``rows``."""
        places = rows.to(self.hidden.device)
        cos, sin = (table.index_select(1, places.to(table.device)) for table in self.tables)
        q = project(self.module, "q", self.hidden.index_select(1, places))
        return self.host.decoder_rotary(self.module)(q, q, cos, sin)[0]

    def mask(self, rows: Tensor) -> Tensor:
        """Keys that the tokens ``rows`` look at [r, P + L] bool."""
        rows = rows.cpu()
        return self.visible[None] & (torch.arange(self.visible.numel())[None] <= self.past + rows[:, None])

    def of(self, rows: Tensor) -> Tensor:
        """Attention [H, r, P + L] of the tokens ``rows``, float32."""
        k = self.keys()
        return query_attention(self.queries(rows), k, self.mask(rows)[None].to(k.device), scale=self.module.scaling)[0]

    def share(self, rows: Tensor, columns: Tensor) -> float:
        """Part of the attention of the tokens ``rows`` that goes to the tokens ``columns``, mean over heads."""
        if rows.numel() == 0 or columns.numel() == 0:
            return 0.0
        places = (columns + self.past).to(self.hidden.device)
        total = sum(float(self.of(part)[:, :, places].sum(-1).mean(0).sum()) for part in rows.split(ROWS))
        return total / rows.numel()

    def walk(self, rows: Tensor, total: int) -> Tensor:
        """Importance [L] of the present tokens by a random walk over the tokens ``rows``; zero elsewhere."""
        importance = self.hidden.new_zeros(self.hidden.shape[1], dtype=torch.float32)
        places, columns = rows.to(self.hidden.device), rows + self.past

        def mask(part: slice) -> Tensor:
            return self.mask(rows[part])

        found = walk_importance(self.queries(rows), self.keys(), mask, columns, total, self.module.scaling)
        importance[places] = found.to(importance)
        return importance


def row_tables(tables: Tables, row: int) -> Tables:
    """Rotary tables of one row, [1, L, d]."""
    cos, sin = (table if table.shape[0] == 1 else table[row : row + 1] for table in tables)
    return cos, sin


def project(attention: Any, part: str, hidden: Tensor) -> Tensor:
    """Queries, keys or values [B, heads, length, d] of some states, behind the per-head norm where there is one."""
    projected = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)
    return (projected if norm is None else norm(projected)).transpose(1, 2)


def cached_keys(cache: Any, layer: int, length: int) -> Tensor | None:
    """Rotated keys of a layer from its cache, or None when the cache does not hold them in full precision."""
    if cache is None or len(cache.layers) <= layer:
        return None
    keys = getattr(cache.layers[layer], "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.shape[-2] < length:
        return None
    return keys[..., :length, :]


def unreadable_cache() -> HostError:
    """The error for caches that keep no plain keys."""
    return HostError(
        "The cache does not give out its keys in full precision, which this method ranks by; use a DynamicCache, or "
        "start the conversation anew."
    )
