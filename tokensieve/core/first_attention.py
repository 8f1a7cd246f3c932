"""What the text of a prompt attends to in the first layer of the LLM, before anything of the LLM has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.layer_attention import ROWS, LayerAttention, row_tables
from tokensieve.core.prefill import PromptItem
from tokensieve.hosts.base import Host

FIRST = "tokens.first_attention"


class FirstAttention:
    """Runs the norm and the query and key projections of the first decoder layer over whole prompts.

    Parameters
    ----------
    host, base
        The family and its composite model without head.
    """

    def __init__(self, host: Host, base: nn.Module) -> None:
        self.host = host
        self.text_model: Any = host.text_model(base)
        self.layer: Any = host.layers(base)[0]

    def fill(
        self, items: Sequence[PromptItem], embeds: Tensor, real: Tensor, past: Tensor, positions: Tensor, cache: Any
    ) -> None:
        """Give every item the signal ``tokens.first_attention``.

        Parameters
        ----------
        items
            Visual items of the batch in order, with the text behind them.
        embeds : Tensor [B, L, D]
            Inputs of the LLM.
        real, past : Tensor [B, L], [B, P]
            Padding masks of the prompts and of what the cache holds of earlier turns.
        positions : Tensor [1 or B, L] or [axes, 1 or B, L]
            Position ids.
        cache
            The model's cache.
        """
        with torch.no_grad():
            for row in sorted({item.row for item in items}):
                self._fill_row([item for item in items if item.row == row], row, embeds, real, past, positions, cache)

    def _fill_row(
        self,
        items: Sequence[PromptItem],
        row: int,
        embeds: Tensor,
        real: Tensor,
        past: Tensor,
        positions: Tensor,
        cache: Any,
    ) -> None:
        hidden = embeds[row : row + 1]
        if positions.ndim == 3 and positions.shape[0] == 4:
            positions = positions[1:]
        tables = row_tables(self.text_model.rotary_emb(embeds, positions.to(embeds.device)), row)
        present = real[row].clone()
        for item in items:
            encoded = item.encoded
            if encoded.frames_kept is not None:
                # Frames that were not encoded stand in the prompt as zeros until the compactor removes them.
                _, kept = encoded.layout.of_views(encoded.frames_kept)
                present[item.positions] = False
                present[item.positions[kept]] = True
        visible = torch.cat((past[row], present))
        attention = LayerAttention(
            self.host, self.layer.self_attn, self.layer.input_layernorm(hidden), tables, visible, cache, row, True
        )
        asking = items[-1].text
        if asking is None or asking.numel() == 0:
            asking = real[row].nonzero()[-1]
        parts = [attention.of(part).mean(0).sum(0) for part in asking.split(ROWS)]
        mean = torch.stack(parts).sum(0)[attention.past :] / asking.numel()
        for item in items:
            places = item.positions[item.encoded.layout.patch_tokens]
            item.given[FIRST] = mean[places.to(mean.device)]
