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
SeparatorRule = Literal["in-place", "after-frame", "occupied", "drop", "per-frame", "per-group"]
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
        Where newline embeddings go: in place, all of a frame's behind its survivors (``"after-frame"``), only those of
        grid rows that still hold a token (``"occupied"``), nowhere (``"drop"``, the one behind a video included), one
        behind every frame, empty ones too (``"per-frame"``), or one behind every group of survivors
        (``"per-group"``).
    groups : Tensor [M], optional
        For ``"per-group"``: group of every survivor, never falling along ``keep``.
    separator : Tensor [D], optional
        Embedding to put in where ``"per-frame"`` or ``"per-group"`` wants a separator that the host does not have; it
        takes the place of a token that does not survive. None puts nothing in.
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
    groups: Tensor | None = None
    separator: Tensor | None = None

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
        if self.separators == "per-group":
            groups = None if self.groups is None else self.groups.detach().long().cpu()
            if groups is None or groups.shape != keep.shape or bool((groups.diff() < 0).any()):
                raise MethodError(f"{method} wants a separator per group but does not give the groups in order.")
            self.groups = groups
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
    first = plans[0]
    groups = None
    if all(plan.groups is not None for plan in plans):
        parts, offset = [], 0
        for plan in plans:
            assert plan.groups is not None
            parts.append(plan.groups.cpu() + offset)
            offset = int(parts[-1].max()) + 1
        groups = torch.cat(parts)
    return Plan(
        keep, features, merged, first.positions, first.separators, info=info, groups=groups, separator=first.separator
    )


def reading_order(layout: Layout, plan: Plan) -> tuple[Tensor, Tensor]:
    """Tokens of the item that survive, in the order in which the LLM reads them.

    Without row separators, and in groups, the order of ``plan.keep`` is the reading order, and the separators that
    belong to no view follow at the end. Otherwise survivors and row separators are arranged by frame and row.

    Returns
    -------
    tokens : Tensor [M + separators]
        Token ids of the item (separators included).
    slots : Tensor [M + separators]
        Index into ``plan.keep`` of every token, -1 for separators, -2 for tokens that become a separator.
    """
    if plan.separators in ("drop", "per-frame", "per-group"):
        return _one_each(layout, plan)
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


def _one_each(layout: Layout, plan: Plan) -> tuple[Tensor, Tensor]:
    """Reading order without separators, or with one behind each frame or group."""
    tokens, slots = layout.patch_tokens[plan.keep], torch.arange(plan.keep.numel())
    if plan.separators == "drop":
        return tokens, slots
    views = torch.arange(len(layout.views)) if plan.views is None else plan.views
    if plan.separators == "per-frame":
        owner = layout.view[tokens]
        order = _stable_by(owner, tokens)
        tokens, slots, ends = tokens[order], order, views.tolist()
        sizes = torch.bincount(owner, minlength=len(layout.views))[views].tolist()
    else:
        assert plan.groups is not None
        sizes = torch.unique_consecutive(plan.groups, return_counts=True)[1].tolist()
        ends = layout.view[tokens[torch.tensor(sizes).cumsum(0) - 1]].tolist()
    taker = _Separators(layout, tokens, plan.separator is not None)
    parts: list[tuple[Tensor, Tensor]] = []
    for part, places, view in zip(tokens.split(sizes), slots.split(sizes), ends, strict=True):
        parts.append((part, places))
        found = taker.take(view)
        if found is not None:
            parts.append((torch.tensor(found[:1]), torch.tensor(found[1:])))
    outside = ((~layout.is_patch) & (layout.view < 0)).nonzero().flatten()
    parts.append((outside, torch.full_like(outside, -1)))
    return torch.cat([part for part, _ in parts]), torch.cat([places for _, places in parts])


class _Separators:
    """Hands out tokens that can stand as separators, at most once each."""

    def __init__(self, layout: Layout, kept: Tensor, may_replace: bool) -> None:
        own = ((~layout.is_patch) & (layout.view >= 0)).nonzero().flatten()
        free = layout.patch_tokens[~torch.isin(layout.patch_tokens, kept)] if may_replace and not own.numel() else own
        self.mark = -1 if own.numel() else -2
        self.free: dict[int, list[int]] = {}
        for token, view in zip(free.tolist(), layout.view[free].tolist(), strict=True):
            self.free.setdefault(view, []).append(token)

    def take(self, view: int) -> tuple[int, int] | None:
        """Token and slot of a separator behind a frame: its last free one, or one of the nearest frame that has any."""
        if not self.free.get(view):
            others = (other for other, left in self.free.items() if left)
            nearest = min(others, key=lambda other: (abs(other - view), other < view), default=None)
            if nearest is None:
                return None
            view = nearest
        return self.free[view].pop(), self.mark


def _stable_by(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, then the second, and so on."""
    order = torch.arange(keys[0].numel())
    for key in reversed(keys):
        order = order[torch.sort(key[order].long(), stable=True).indices]
    return order
