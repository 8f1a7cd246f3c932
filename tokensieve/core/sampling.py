"""What a method inside the LLM gets to see of one prompt row."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.core.cuts import Cut
from tokensieve.core.method import Method
from tokensieve.core.prompt_state import Prompt
from tokensieve.core.sample import DecoderSample, HostFacts


def decoder_sample(
    prompt: Prompt,
    row: int,
    cut: Cut,
    number: int,
    method: Method,
    hidden: Tensor,
    visual: Tensor,
    signals: dict[str, Tensor],
    facts: HostFacts,
) -> DecoderSample:
    """The sample of one row at one cut.

    Parameters
    ----------
    number
        Which decoder method of the run the method is.
    hidden : Tensor [B, L, D]
        States of the batch.
    visual : Tensor [n]
        Positions of the tokens that the method decides on.
    """
    tracked = prompt.tracked
    item_of, token, patch = (part[row, visual] for part in (tracked.item, tracked.token, tracked.patch))
    view, local, cell = torch.zeros_like(visual), torch.zeros_like(visual), torch.zeros_like(visual)
    behind_item = torch.full((prompt.real.shape[1],), -1)
    requests = method.signals(facts)
    tower: dict[str, list[Tensor]] = {request: [] for request in requests}
    frames, budget = 0, []
    mine = [(i, item) for i, item in enumerate(prompt.items) if item.row == row]
    for order, (i, item) in enumerate(mine):
        layout, spots = item.encoded.layout, item_of == i
        local[spots] = order
        view[spots] = layout.view[token[spots]] + frames
        cell[spots] = layout.row[token[spots]] * (int(layout.column.max()) + 1) + layout.column[token[spots]]
        if layout.kind == "image":
            # The views of a picture are no moments: the same place of another one is another cell.
            cell[spots] += layout.view[token[spots]] * (int(layout.row.max()) + 1) * (int(layout.column.max()) + 1)
        behind_item[tracked.item[row] == i] = order
        frames += len(layout.views)
        for request in requests:
            if request in item.signals and not method.cuts_separators:
                values = item.signals[request]
                tower[request].append(values[patch[spots].to(values.device)])
        if number in item.budgets:
            counts = torch.zeros(len(layout.views), dtype=torch.long)
            kept = item.encoded.frames_kept
            counts[slice(None) if kept is None else kept] = item.budgets[number]
            budget.append(counts)
    return DecoderSample(
        hidden=hidden[row].index_select(0, visual.to(hidden.device)),
        layer=cut.layer,
        entered=prompt.entered(row),
        view=view,
        item=local,
        signals=signals,
        memory=prompt.memory[number, row],
        budget=torch.cat(budget) if budget else None,
        facts=facts,
        uncompressed=torch.tensor([item.encoded.layout.patches for _, item in mine]),
        cut=cut,
        patch=patch,
        cell=cell,
        text_item=behind_item.cummax(0).values[prompt.text(row)],
        infos=[prompt.trace.items[i].info for i, _ in mine],
        tower={request: torch.cat(parts) for request, parts in tower.items() if parts},
    )
