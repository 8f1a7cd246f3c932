"""HiPrune: anchors, buffers and registers chosen from the attention of two encoder layers.

Based on "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models"
(arXiv 2508.00553). Anchors are the patches most attended to in a middle layer (objects), buffers their
neighbours on the grid, and registers the patches most attended to in the deep layer, which fill the rest of
the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Selector, Stage
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count, round_half_even
from tokensieve.ops.grid import cross_neighbours
from tokensieve.ops.select import top_indices, top_mask


def anchor_count(budget: int, alpha: float) -> int:
    """Number of anchors of a frame, ``round(budget * alpha / 5)`` with halves to even (step 2).

    Parameters
    ----------
    budget : int
        Tokens kept per frame.
    alpha : float
        Share of the budget for anchors with their four neighbours, from 0 to 1.

    Returns
    -------
    int
        The number of anchors.

    Raises
    ------
    MethodError
        If alpha is outside 0..1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise MethodError(f"alpha is {alpha}, but it is a share from 0 to 1; the published value is 0.1.")
    return round_half_even(budget * alpha / 5)


def anchors_and_buffers(object_score: Tensor, anchors: int | Tensor, grid_width: int) -> Tensor:
    """Mark the most attended patches and their four grid neighbours (step 3).

    Parameters
    ----------
    object_score : Tensor
        ``[F, N]`` attention received in the middle layer.
    anchors : int or Tensor
        Anchors per frame, one number or ``[F]``.
    grid_width : int
        Patches per row; neighbours wrap at row ends and are clamped to the first and last patch.

    Returns
    -------
    Tensor
        ``[F, N]`` bool.
    """
    frames, total = object_score.shape
    per_frame = torch.as_tensor(anchors, device=object_score.device).expand(frames)
    marked = torch.zeros_like(object_score, dtype=torch.bool)
    most = int(per_frame.max())
    if most == 0:
        return marked
    ranked = top_indices(object_score, most, order="rank")
    cross = cross_neighbours(ranked, grid_width, total)
    # Anchors beyond a frame's number point at its first anchor, which is marked anyway, or at nothing.
    wanted = torch.arange(ranked.shape[1], device=ranked.device) < per_frame.unsqueeze(1)
    cross = torch.where(wanted.unsqueeze(2), cross, cross[:, :1, :1])
    marked.scatter_(1, cross.flatten(1), True)
    return marked & (per_frame > 0).unsqueeze(1)


def select_hierarchical(
    object_score: Tensor,
    deep_score: Tensor,
    budget: int,
    *,
    grid_width: int,
    alpha: float = 0.1,
    official: bool = False,
) -> Tensor:
    """Patches that survive in every frame (steps 2 to 5).

    Parameters
    ----------
    object_score : Tensor
        ``[F, N]`` attention received by each patch in the middle ("object") layer, class token column
        removed.
    deep_score : Tensor
        ``[F, N]`` the same from the deep layer.
    budget : int
        Patches to keep per frame, from 1 to N.
    grid_width : int
        Patches per row.
    alpha : float
        Share of the budget for anchors and buffers.
    official : bool
        Exclude anchors and buffers from the registers by subtracting 1 from their score, as the released
        code does. On scores that are not probabilities some are then chosen twice and fewer than ``budget``
        patches survive. By default they are excluded for certain, and a frame takes fewer anchors if its
        buffers exceed the budget, so that exactly ``budget`` patches survive.

    Returns
    -------
    Tensor
        ``[F, N]`` bool.

    Raises
    ------
    MethodError
        If the shapes differ, the budget or alpha is out of range, or (official only) the buffers alone
        exceed the budget.
    """
    if object_score.shape != deep_score.shape or object_score.dim() != 2:
        raise MethodError(
            f"HiPrune needs two scores [F, N] of equal shape, but they are {tuple(object_score.shape)} and "
            f"{tuple(deep_score.shape)}."
        )
    frames, total = object_score.shape
    if not 1 <= budget <= total:
        raise MethodError(f"cannot keep {budget} of {total} patches per frame; keep at least 1 and at most all.")
    anchors = torch.full((frames,), anchor_count(budget, alpha), device=object_score.device)
    marked = anchors_and_buffers(object_score, anchors, grid_width)
    excess = marked.sum(dim=1) > budget
    if official and bool(excess.any()):
        raise MethodError(f"anchors and buffers alone exceed the budget of {budget} patches; lower alpha ({alpha}).")
    while bool(excess.any()):
        anchors = anchors - excess.long()
        marked = anchors_and_buffers(object_score, anchors, grid_width)
        excess = marked.sum(dim=1) > budget
    registers = budget - marked.sum(dim=1)
    rest = deep_score - marked.to(deep_score.dtype) if official else deep_score.masked_fill(marked, float("-inf"))
    return marked | top_mask(rest, registers)


def frame_share(total_budget: int, frames: int) -> int:
    """Budget of each frame or crop, ``int(total / frames)``, at least 1.

    Parameters
    ----------
    total_budget : int
        Tokens kept over all frames.
    frames : int
        Number of frames or crops.

    Returns
    -------
    int
        Tokens per frame; the remainder of the division is not used.
    """
    return max(1, total_budget // frames)


def merged_unit_scores(patch_score: Tensor, unit: int = 4, restore: Tensor | None = None) -> Tensor:
    """Scores per merged token of an encoder that joins neighbouring patches (Qwen2.5-VL wiring).

    Parameters
    ----------
    patch_score : Tensor
        ``[..., n * unit]`` attention received by each patch, in the encoder's order.
    unit : int
        Patches per merged token.
    restore : Tensor, optional
        ``[n]`` permutation that undoes the window order of the merged tokens.

    Returns
    -------
    Tensor
        ``[..., n]`` mean over the patches of each unit.
    """
    merged = patch_score.unflatten(-1, (-1, unit)).mean(dim=-1)
    return merged if restore is None else merged[..., restore]


@register
@dataclass
class HiPrune(Selector):
    """HiPrune: every view keeps its anchors, their neighbours, and the most attended patches of the deep layer.

    Videos are not part of the publication; each frame is treated as a picture with its share of the budget.

    Parameters
    ----------
    alpha
        Share of the budget for anchors and their neighbours.
    object_layer
        Tower layer of the anchors, counted from one as in the paper; None takes 9 of 24 (CLIP), 16 of 32
        (Qwen2.5-VL) or the same share of another depth.
    official
        Reproduce the released way to exclude anchors from the registers, see `select_hierarchical`.
    """

    retention: float = 1 / 3
    alpha: float = 0.1
    object_layer: int | None = None
    official: bool = False

    name: ClassVar[str] = "hiprune"
    title: ClassVar[str] = "HiPrune"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"
    venue: ClassVar[str] = "ACL Findings 2026"
    code: ClassVar[str] = "https://github.com/Danielement321/HiPrune"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    fidelity_note: ClassVar[str] = "exact on images; per-frame use on videos and other tower depths are inferred"

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Received attention of the object layer and of the layer that is projected."""
        return self._requests(facts)

    def _requests(self, facts: HostFacts) -> tuple[str, str]:
        layer = self.object_layer or max(1, round(facts.tower_layers * (0.5 if facts.position_axes > 1 else 0.375)))
        return f"encoder.received_attention@{layer - 1}", "encoder.received_attention@feature"

    def token_count(self, layout: Layout) -> int:
        """Every view takes the integer part of its share, at least one token."""
        return int(_view_shares(layout, keep_count(layout.patches, self.retention)).sum())

    def select(self, sample: TokenSample, count: int) -> Tensor:
        """Deal the count out to the views by size, then choose in every view."""
        assert sample.facts is not None
        shallow, deep = (sample.signal(request) for request in self._requests(sample.facts))
        sizes = sample.layout.patches_per_view
        counts = _view_shares(sample.layout, count)
        keeps, start = [], 0
        for view, (size, share) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True)):
            part = slice(start, start + size)
            # Published scores sum the columns of the attention matrix in Qwen towers and average them in CLIP's.
            scale = size if sample.facts.position_axes > 1 else 1
            mask = select_hierarchical(
                shallow[part][None] * scale,
                deep[part][None] * scale,
                share,
                grid_width=sample.layout.views[view][1],
                alpha=self.alpha,
                official=self.official,
            )
            keeps.append(mask[0].nonzero()[:, 0] + start)
            start += size
        return torch.cat(keeps)


def _view_shares(layout: Layout, count: int) -> Tensor:
    """Tokens of every view: the integer part of its share of ``count`` by size, at least one, int64 [views]."""
    sizes = layout.patches_per_view
    return (sizes * count // sizes.sum()).clamp(min=1)
