"""A batch of prompts on its way through the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.prefill import PromptItem, Tracked
from tokensieve.core.trace import PrefillTrace


@dataclass
class Prompt:
    """The batch as it runs through the decoder in one prefill.

    Attributes
    ----------
    real : Tensor [B, L]
        Padding mask of the present sequence.
    pasts : dict
        First decoder layer -> padding mask [B, P] of the cache entries in front of the sequence, from that
        layer on; layer 0 is always present.
    tracked : Tracked
        Origin of every present token.
    items
        Visual items of the batch.
    positions : Tensor, optional
        Position ids [1 or B, L] of hosts with one position axis.
    memory
        (method number, row) -> what the method remembers of the row.
    """

    real: Tensor
    pasts: dict[int, Tensor]
    tracked: Tracked
    items: list[PromptItem]
    trace: PrefillTrace
    positions: Tensor | None = None
    memory: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    def keys(self, layer: int) -> Tensor:
        """Padding mask [B, P + L] of the keys that a decoder layer sees."""
        past = self.pasts[max(first for first in self.pasts if first <= layer)]
        return torch.cat((past, self.real), 1)

    def visual(self, row: int) -> Tensor:
        """Positions of the visual patch tokens of a row."""
        return ((self.tracked.patch[row] >= 0) & self.real[row]).nonzero().flatten()

    def behind(self, row: int) -> Tensor:
        """Positions of the text tokens behind the last visual item of a row."""
        visual = (self.tracked.item[row] >= 0).nonzero().flatten()
        start = int(visual[-1]) + 1 if visual.numel() else 0
        tail = self.real[row].clone()
        tail[:start] = False
        return tail.nonzero().flatten()

    def last(self, row: int) -> int:
        """Position of the last real token of a row."""
        return int(self.real[row].nonzero()[-1])

    def entered(self, row: int) -> int:
        """Number of visual patch tokens of a row that entered the LLM."""
        return sum(trace.keep.numel() for trace in self.trace.items if trace.row == row)
