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
    origin : Tensor [B, L]
        Place in front of the first layer of every present token; -1 for padding.
    numbers : Tensor [B, L0]
        Which visual token of the conversation stands at every place in front of the first layer; -1 for others.
    total
        Tokens of every row in front of the first layer.
    """

    real: Tensor
    pasts: dict[int, Tensor]
    tracked: Tracked
    items: list[PromptItem]
    trace: PrefillTrace
    positions: Tensor | None = None
    memory: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    origin: Tensor = field(init=False)
    numbers: Tensor = field(init=False)
    total: list[int] = field(init=False)

    def __post_init__(self) -> None:
        batch, length = self.real.shape
        self.origin = torch.arange(length).expand(batch, -1).masked_fill(~self.real, -1)
        patches = (self.tracked.patch >= 0) & self.real
        self.numbers = (patches.long().cumsum(1) - 1).masked_fill(~patches, -1)
        self.total = self.real.sum(1).tolist()

    def number_from(self, first: int) -> None:
        """Count the visual tokens of every row from ``first`` on."""
        self.numbers = torch.where(self.numbers < 0, -1, self.numbers + first)

    @property
    def present(self) -> Tensor:
        """Visual number of every present token [B, L]; -1 for others."""
        return self.numbers.gather(1, self.origin.clamp(min=0)).masked_fill(self.origin < 0, -1)

    def move(self, index: Tensor, real: Tensor) -> None:
        """Follow a compaction to the tokens at ``index [B, L']``."""
        pad = ~real
        self.tracked = self.tracked.at(index, pad)
        self.origin = self.origin.gather(1, index).masked_fill(pad, -1)
        self.real = real

    def keys(self, layer: int) -> Tensor:
        """Padding mask [B, P + L] of the keys that a decoder layer sees."""
        past = self.pasts[max(first for first in self.pasts if first <= layer)]
        return torch.cat((past, self.real), 1)

    def visual(self, row: int, separators: bool = False) -> Tensor:
        """Positions of the visual patch tokens of a row, on demand with the separators of grid rows among them."""
        chosen = self.tracked.patch[row] >= 0
        if separators:
            lone = (self.tracked.item[row] >= 0) & ~chosen
            for number in self.tracked.item[row, lone].unique().tolist():
                places = (lone & (self.tracked.item[row] == number)).nonzero().flatten()
                chosen[places] = self.items[number].encoded.layout.view[self.tracked.token[row, places]] >= 0
        return (chosen & self.real[row]).nonzero().flatten()

    def text(self, row: int) -> Tensor:
        """Positions of all text tokens of a row."""
        return ((self.tracked.item[row] < 0) & self.real[row]).nonzero().flatten()

    def lone_separators(self, row: int, kept: Tensor) -> Tensor:
        """Separators [L] bool of the items that keep no token, by the positions of those that a row keeps."""
        item = self.tracked.item[row]
        left = torch.isin(item, item[kept])
        return (item >= 0) & (self.tracked.patch[row] < 0) & ~left

    def rows(self, row: int) -> Tensor:
        """Positions of all tokens of a row, those that nobody attends to included."""
        return (self.origin[row] >= 0).nonzero().flatten()

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


@dataclass
class Aside:
    """Tokens that were put aside and may come back, at their places in front of the first layer.

    Attributes
    ----------
    states : Tensor [B, L0, D]
        States of the tokens put aside; anything elsewhere.
    present : Tensor [B, L0]
        Which ones these are.
    tracked : Tracked
        Origins of all tokens.
    tables, position_ids, positions
        Rotary tables and positions of all tokens.
    removed
        How much shorter the padded batch was than the prompt.
    """

    states: Tensor
    present: Tensor
    tracked: Tracked
    tables: tuple[Tensor, Tensor]
    position_ids: Tensor | None
    positions: Tensor | None
    removed: int

    @classmethod
    def start(cls, prompt: Prompt, hidden: Tensor, kwargs: dict[str, Any], removed: int) -> Aside:
        """Nothing put aside yet, in front of the first layer."""
        tables, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        nobody = torch.zeros_like(prompt.real)
        return cls(hidden, nobody, prompt.tracked, tables, ids, prompt.positions, removed)

    def put(self, prompt: Prompt, hidden: Tensor, dropped: list[Tensor]) -> None:
        """Keep the states of the tokens at ``dropped`` of every row."""
        self.states = self.states.clone()
        for row, places in enumerate(dropped):
            origin = prompt.origin[row, places]
            self.present[row, origin] = True
            self.states[row, origin.to(hidden.device)] = hidden[row, places.to(hidden.device)]

    def bring_back(self, prompt: Prompt, hidden: Tensor, kwargs: dict[str, Any], last: bool = False) -> Tensor:
        """States of all tokens at their first places; the prompt and the arguments follow.

        The last time the states are handed over without a copy, if they are a copy of what the first layer got.
        """
        states, real = self.states.to(hidden.device), self.present.clone()
        if not (last and bool(self.present.any())):
            states = states.clone()
        for row in range(real.shape[0]):
            places = prompt.rows(row)
            origin = prompt.origin[row, places]
            real[row, origin] = True
            states[row, origin.to(hidden.device)] = hidden[row, places.to(hidden.device)]
        prompt.real, prompt.positions = real, self.positions
        prompt.origin = torch.arange(real.shape[1]).expand_as(real).masked_fill(~real, -1)
        prompt.tracked = self.tracked.at(torch.arange(real.shape[1]).expand_as(real), ~real)
        kwargs["position_embeddings"] = tuple(table.to(hidden.device) for table in self.tables)
        kwargs["position_ids"] = self.position_ids
        return states
