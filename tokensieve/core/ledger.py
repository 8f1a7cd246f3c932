"""What a compacted KV cache must remember: which entries are real, and how far it is from the full prompt.

``generate`` and the composite models measure a cache in tokens of the uncompressed conversation; the attention
layers measure it in entries. A ledger is bound to one cache object and answers both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_tokensieve_ledger"


@dataclass
class Span:
    """Consecutive decoder layers whose caches have the same length.

    Attributes
    ----------
    real : Tensor [B, P]
        Which of the P entries at the time of the last compaction are real.
    removed
        Tokens of the full conversation that these layers do not hold (in the padded batch).
    offset : Tensor [B, 1], optional
        How much smaller the positions of coming tokens are in these layers than in front of the first one.
    visual : Tensor [B, P], optional
        Which visual token of the conversation each entry is, the same number in all layers; -1 for other entries.
    """

    real: Tensor
    removed: int
    offset: Tensor | None = None
    visual: Tensor | None = None

    @property
    def ragged(self) -> bool:
        """Whether some entries are padding."""
        return not bool(self.real.all())

    def mask(self, physical: int, given: Tensor | None) -> Tensor:
        """Padding mask [B, physical]; entries behind the compaction follow the caller's mask or are real."""
        batch, known = self.real.shape
        tail = torch.ones(batch, physical - known, dtype=torch.bool)
        if given is not None and physical > known:
            tail = given[:, given.shape[1] - (physical - known) :]
        return torch.cat((self.real, tail.expand(batch, -1)), dim=1)

    def numbers(self, physical: int) -> Tensor:
        """Visual numbers [B, physical]; entries behind the compaction are none."""
        batch, known = self.real.shape
        numbers = torch.full((batch, physical), -1)
        if self.visual is not None:
            numbers[:, :known] = self.visual
        return numbers


@dataclass
class Ledger:
    """Book-keeping of one cache.

    Attributes
    ----------
    spans
        First decoder layer of each span -> span; layer 0 is always present.
    offset : Tensor [B, 1]
        How much smaller the positions of coming tokens are than in the full prompt (renumbered hosts).
    inside
        True while the language model runs: then the cache answers in entries, like any cache.
    memory
        What a method that selects cache entries remembers of the answer being decoded, row by row.
    """

    spans: dict[int, Span] = field(default_factory=dict)
    offset: Tensor | None = None
    inside: bool = False
    memory: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, cache: Any) -> Ledger | None:
        """The ledger bound to a cache, if any."""
        return getattr(cache, _ATTRIBUTE, None) if cache is not None else None

    def bind(self, cache: Any) -> None:
        """Make the cache answer ``get_seq_length`` in tokens of the full conversation outside the model.

        When beams change places, what is remembered of them goes along.
        """
        setattr(cache, _ATTRIBUTE, self)
        if "get_seq_length" not in vars(cache):
            cache.get_seq_length = MethodType(_logical_length, cache)
            cache.reorder_cache = MethodType(_reorder, cache)

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row ``rows[i]`` remembers."""
        if self.memory:
            self.memory = [{key: copy.copy(value) for key, value in self.memory[row].items()} for row in rows.tolist()]

    def span(self, layer: int) -> Span:
        """The span that a decoder layer belongs to."""
        return self.spans[max(first for first in self.spans if first <= layer)]


def _logical_length(cache: Any, layer_idx: int = 0) -> Any:
    length = type(cache).get_seq_length(cache, layer_idx)
    ledger = Ledger.of(cache)
    if ledger is None or ledger.inside:
        return length
    return length + ledger.span(layer_idx).removed


def _reorder(cache: Any, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    ledger = Ledger.of(cache)
    if ledger is not None:
        ledger.reorder(beam_idx)
