"""What a method decided, as data, and the reading order that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.errors import MethodError
from tokensieve.ops.merge import MergeMap

__all__ = ["Fate", "MergeMap", "Plan", "Positions", "SeparatorRule", "join_views", "keep_all", "reading_order"]

Positions = Literal["original", "renumber"]
SeparatorRule = Literal["in-place", "after-frame", "occupied"]
Fate = Literal["gone", "evicted", "aside", "hidden"]
"""What becomes of the tokens that a plan inside the LLM leaves out, see `Plan`."""


@dataclass
class Plan:
    """Decision of a method on one sample, in local patch ids.

    Attributes
    ----------
    keep : Tensor [M]
        Source patch of every surviving token in reading order (ascending unless the method says otherwise);
        every id at most once.
    features : Tensor [M, D], optional
        Replacement features of the survivors (merging methods); None leaves them unmodified.
    merged : MergeMap, optional
        Which patches were folded into which survivor (sources are patches, targets places in ``keep``).
    positions
        ``"renumber"`` gives the shortened sequence the positions 0..L-1, as wrappers that cut before the LLM
        do; ``"original"`` keeps the coordinates of the survivors. Hosts with several position axes always
        keep the original coordinates.
    separators
        Where newline embeddings go: in place, all of a frame's behind its survivors, or only those of grid
        rows that still hold a token.
    views : Tensor, optional
        Views that take part at all; separators of the others go. None means all.
    info
        Named quantities worth looking at (frame uniqueness, budgets, scores); shown by reports and pictures.
    fate
        Inside the LLM only. Tokens left out are ``"gone"`` from this cut on; ``"evicted"`` also leaves the caches of
        the layers that have run; ``"aside"`` keeps their states for a later cut that restores them; ``"hidden"`` tokens
        stay in the sequence but no later layer attends to them.
    """

    keep: Tensor
    features: Tensor | None = None
    merged: MergeMap | None = None
    positions: Positions = "renumber"
    separators: SeparatorRule = "in-place"
    views: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    fate: Fate = "gone"

    def checked(self, patches: int, method: str, may_be_empty: bool = False) -> Plan:
        """The plan with ``keep`` on the CPU, or a MethodError when it is empty, repeated or out of range."""
        keep = self.keep.detach().long().cpu()
        if keep.numel() == 0 and may_be_empty:
            self.keep = keep
            return self
        if keep.numel() == 0:
            raise MethodError(f"{method} kept none of {patches} visual tokens; raise the retention.")
        ordered = keep.sort().values
        if int(ordered[0]) < 0 or int(ordered[-1]) >= patches or bool((ordered[1:] == ordered[:-1]).any()):
            raise MethodError(f"{method} returned token ids that repeat or lie outside 0..{patches - 1}.")
        if self.features is not None and self.features.shape[0] != keep.numel():
            raise MethodError(f"{method} returned {self.features.shape[0]} features for {keep.numel()} kept tokens.")
        self.keep = keep
        if self.merged is not None:
            self.merged = MergeMap(*(part.detach().cpu() for part in self.merged))
        return self


def keep_all(patches: int, positions: Positions = "renumber") -> Plan:
    """The plan that changes nothing."""
    return Plan(torch.arange(patches), positions=positions)


def join_views(layout: Layout, plans: Sequence[Plan]) -> Plan:
    """One plan for an item whose views were planned one by one."""
    starts = (layout.patches_per_view.cumsum(0) - layout.patches_per_view).tolist()
    keep = torch.cat([plan.keep.cpu() + start for plan, start in zip(plans, starts, strict=False)])
    features = None
    if any(plan.features is not None for plan in plans):
        if any(plan.features is None for plan in plans):
            raise MethodError("A method replaced the features of some views of an image but not of others.")
        features = torch.cat([plan.features for plan in plans if plan.features is not None])
    merged = None
    if all(plan.merged is not None for plan in plans):
        slots = torch.tensor([0] + [plan.keep.numel() for plan in plans]).cumsum(0).tolist()
        maps = [plan.merged for plan in plans if plan.merged is not None]
        merged = MergeMap(
            torch.cat([m.source.cpu() + start for m, start in zip(maps, starts, strict=False)]),
            torch.cat([m.target.cpu() + slot for m, slot in zip(maps, slots, strict=False)]),
            torch.cat([m.weight.cpu() for m in maps]),
        )
    info = {f"view{i}.{key}": value for i, plan in enumerate(plans) for key, value in plan.info.items()}
    return Plan(keep, features, merged, plans[0].positions, plans[0].separators, info=info)


def reading_order(layout: Layout, plan: Plan) -> tuple[Tensor, Tensor]:
    """Tokens of the item that survive, in the order in which the LLM reads them.

    Without row separators the order of ``plan.keep`` is the reading order and the separators that belong to
    no view follow at the end. With row separators survivors and separators are arranged by frame and row.

    Returns
    -------
    tokens : Tensor [M + separators]
        Token ids of the item (separators included).
    slots : Tensor [M + separators]
        Index into ``plan.keep`` of every token, -1 for separators.
    """
    keep = plan.keep
    patch_tokens = layout.patch_tokens[keep]
    separators = (~layout.is_patch).nonzero().flatten()
    if plan.views is not None:
        owner = layout.view[separators]
        separators = separators[torch.isin(owner, plan.views) | (owner < 0)]
    slots = torch.cat((torch.arange(keep.numel()), torch.full_like(separators, -1)))
    tokens = torch.cat((patch_tokens, separators))
    if not layout.has_row_separators:
        return tokens, slots
    if plan.separators == "occupied":
        used = torch.zeros(layout.tokens, dtype=torch.bool)
        row_id = layout.view * (int(layout.row.max()) + 1) + layout.row
        used[:] = torch.isin(row_id, row_id[patch_tokens]) & (layout.view >= 0)
        selected = torch.cat((torch.ones(keep.numel(), dtype=torch.bool), used[separators]))
        tokens, slots = tokens[selected], slots[selected]
    frame = layout.view[tokens].clone()
    frame[frame < 0] = len(layout.views)
    if plan.separators == "after-frame":
        order = torch.arange(tokens.numel())[_stable_by(frame, slots < 0, tokens)]
    else:
        order = _stable_by(frame, tokens)
    return tokens[order], slots[order]


def _stable_by(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, then the second, and so on."""
    order = torch.arange(keys[0].numel())
    for key in reversed(keys):
        order = order[torch.sort(key[order].long(), stable=True).indices]
    return order
