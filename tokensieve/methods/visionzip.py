"""VisionZip: the most attended patches of every frame, and the others folded into a few contextual tokens.

Based on "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467, CVPR
2025). Dominant patches stay as they are. Of the others every n-th becomes a contextual token, to which the
remaining ones are added by the similarity of their keys. Frames are compressed alone and all at once.

Compression happens behind the projector, as in the published video form. The image form merges in front of it,
so that its contextual tokens differ on CLIP hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.merge import MergedTokens, MergeMap
from tokensieve.ops.select import top_indices
from tokensieve.ops.similarity import as_float32, unit_vectors

DOMINANT_SHARE = 54 / 64
ContextMerge = Literal["added", "mean"]


def split_budget(tokens: int, dominant_share: float = DOMINANT_SHARE) -> tuple[int, int]:
    """Dominant and contextual tokens of a frame, ``int(tokens * share)`` and the rest (form B, step 3).

    Parameters
    ----------
    tokens : int
        Tokens kept per frame, at least 1.
    dominant_share : float
        54/64 in the video port, from 0 to 1.

    Returns
    -------
    dominant, contextual : int

    Raises
    ------
    MethodError
        If ``tokens`` is below 1 or the share outside 0..1.
    """
    if tokens < 1 or not 0.0 <= dominant_share <= 1.0:
        raise MethodError(
            f"cannot split {tokens} tokens with a dominant share of {dominant_share}; use at least one token and a "
            "share from 0 to 1."
        )
    dominant = int(tokens * dominant_share)
    return dominant, tokens - dominant


def mean_head_keys(keys: Tensor) -> Tensor:
    """Key metric ``[F, N, d]``: keys ``[F, H, N, d]`` averaged over heads in float32 (step 1).

    Keys are taken as the key projection gives them, without the factor that scales queries.
    """
    return as_float32(keys).mean(dim=1)


def assign_context(key_metric: Tensor, rest: Tensor, contextual: int) -> tuple[Tensor, Tensor]:
    """Contextual targets at a regular stride and the target that every other patch goes to (steps 4 to 6).

    Parameters
    ----------
    key_metric : Tensor
        ``[F, N, d]``.
    rest : Tensor
        ``[F, R]`` int64 patches that are not dominant, ascending.
    contextual : int
        c, from 1 to R.

    Returns
    -------
    targets : Tensor
        ``[F, c]`` int64 patch ids, ascending.
    slot : Tensor
        ``[F, R]`` int64 in ``0..c-1``: target of every patch of ``rest``, a target's own for itself. The first
        target wins ties.

    Raises
    ------
    MethodError
        If c is outside 1..R.
    """
    size = rest.shape[1]
    if not 1 <= contextual <= size:
        raise MethodError(
            f"cannot form {contextual} contextual tokens out of the {size} patches that are not dominant; ask for "
            f"1 to {size}."
        )
    stride = max(1, size // contextual)
    places = torch.arange(contextual, device=rest.device) * stride
    units = unit_vectors(key_metric.gather(1, rest.unsqueeze(2).expand(-1, -1, key_metric.shape[2])))
    slot = (units @ units[:, places].transpose(1, 2)).argmax(dim=2)
    slot[:, places] = torch.arange(contextual, device=rest.device)
    return rest[:, places], slot


def context_weights(slot: Tensor, contextual: int, merge: ContextMerge = "added") -> Tensor:
    """Weight of every patch in its contextual token (step 7).

    Parameters
    ----------
    slot : Tensor
        ``[F, R]`` from `assign_context`; the c targets are the places ``j * max(1, R // c)``.
    contextual : int
        c.
    merge : {"added", "mean"}
        ``added``: the target plus the mean of the patches assigned to it, as released; such a token is about
        twice as long as others. ``mean``: the mean over target and assigned patches.

    Returns
    -------
    Tensor
        ``[F, R]`` float32. The weights of a token add up to 2 (``added``, 1 where nothing was assigned) or 1.

    Raises
    ------
    MethodError
        If the rule is unknown.
    """
    if merge not in get_args(ContextMerge):
        raise MethodError(f"context merge '{merge}' is unknown; use 'added' or 'mean'.")
    sizes = torch.zeros(slot.shape[0], contextual, device=slot.device)
    sizes.scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.float32))
    if merge == "mean":
        return (1.0 / sizes).gather(1, slot)
    weight = (1.0 / (sizes - 1).clamp_min(1)).gather(1, slot)
    weight[:, torch.arange(contextual, device=slot.device) * max(1, slot.shape[1] // contextual)] = 1.0
    return weight


def compress_frames(
    features: Tensor,
    attention: Tensor,
    key_metric: Tensor,
    dominant: int,
    contextual: int,
    *,
    context_merge: ContextMerge = "added",
    layout: Literal["flat", "grid"] = "flat",
) -> MergedTokens:
    """Compress the patches of every frame to ``dominant + contextual`` tokens (steps 3 to 8).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` patch features; before the projector on CLIP towers, projected and pooled in the video
        form.
    attention : Tensor
        ``[F, N]`` attention of the class token to each patch, or attention that a patch receives where there
        is no class token. Mean or sum over heads.
    key_metric : Tensor
        ``[F, N, d]`` keys of the same layer averaged over heads, pooled like the features.
    dominant, contextual : int
        Patches kept per frame (the class token of the published counts not included), and merged tokens.
        Without contextual tokens the other patches are dropped.
    context_merge : {"added", "mean"}
        See `context_weights`.
    layout : {"flat", "grid"}
        ``flat``: per frame the dominant patches in raster order, then the contextual tokens. ``grid``: all in
        raster order, a contextual token at the place of its target, for hosts with row newlines.

    Returns
    -------
    MergedTokens
        ``F * (dominant + contextual)`` tokens; ``source`` is ``frame * N + patch``. The dominant rows equal
        their input bit for bit.

    Raises
    ------
    MethodError
        If shapes do not match or the counts do not fit the number of patches.
    """
    frames, patches = features.shape[:2]
    if attention.shape != (frames, patches) or key_metric.shape[:2] != (frames, patches):
        raise MethodError(
            f"VisionZip needs features [F, N, D], attention [F, N] and keys [F, N, d], but the shapes are "
            f"{tuple(features.shape)}, {tuple(attention.shape)} and {tuple(key_metric.shape)}."
        )
    if dominant < 0 or contextual < 0 or not 1 <= dominant + contextual <= patches:
        raise MethodError(
            f"cannot keep {dominant} dominant and {contextual} contextual tokens of {patches} patches per frame."
        )
    device = features.device
    ranked = top_indices(as_float32(attention), patches, order="rank")
    kept, rest = (part.sort(dim=1).values for part in (ranked[:, :dominant], ranked[:, dominant:]))
    start = (torch.arange(frames, device=device) * patches).unsqueeze(1)
    slots = torch.arange(dominant, device=device).expand(frames, -1)
    place = entry = kept
    weight = torch.ones_like(kept, dtype=torch.float32)
    rows = features.gather(1, kept.unsqueeze(2).expand(-1, -1, features.shape[2]))
    if contextual:
        targets, slot = assign_context(key_metric, rest, contextual)
        shares = context_weights(slot, contextual, context_merge)
        # A dense [c, N] weight matrix per frame makes the sum one batched product, far faster than scattering.
        work = as_float32(features)
        dense = work.new_zeros(frames, contextual * patches)
        dense.scatter_(1, slot * patches + rest, shares.to(work.dtype))
        context = torch.bmm(dense.view(frames, contextual, patches), work)
        rows = torch.cat((rows, context.to(features.dtype)), dim=1)
        place = torch.cat((kept, targets), dim=1)
        entry, weight = torch.cat((entry, rest), dim=1), torch.cat((weight, shares), dim=1)
        slots = torch.cat((slots, slot + dominant), dim=1)
    if layout == "grid":
        order = place.argsort(dim=1)
        rank = order.argsort(dim=1)
        rows = rows.gather(1, order.unsqueeze(2).expand_as(rows))
        place, slots = place.gather(1, order), rank.gather(1, slots)
    first = torch.arange(frames, device=device).unsqueeze(1) * (dominant + contextual)
    merge_map = MergeMap((entry + start).flatten(), (slots + first).flatten(), weight.flatten())
    return MergedTokens(rows.flatten(0, 1), (place + start).flatten(), merge_map)


def compress_with_class(
    hidden: Tensor,
    class_attention: Tensor,
    key_metric: Tensor,
    dominant: int,
    contextual: int,
    *,
    context_merge: ContextMerge = "added",
) -> Tensor:
    """The published CLIP form, which passes the class token on (form A, step 8).

    Parameters
    ----------
    hidden : Tensor
        ``[F, N+1, D]`` states of the projected tower layer, class token first.
    class_attention : Tensor
        ``[F, H, N+1]`` attention of the class token in that layer, its own column first.
    key_metric : Tensor
        ``[F, N+1, d]`` keys of that layer averaged over heads.
    dominant, contextual : int
        Published counts: ``dominant`` includes the class token.
    context_merge : {"added", "mean"}
        See `context_weights`.

    Returns
    -------
    Tensor
        ``[F, dominant + contextual, D]``: class token, dominant patches in raster order, contextual tokens.

    Raises
    ------
    MethodError
        As `compress_frames`.
    """
    scores = as_float32(class_attention).sum(dim=1)[:, 1:]
    merged = compress_frames(
        hidden[:, 1:], scores, key_metric[:, 1:], dominant - 1, contextual, context_merge=context_merge
    )
    patches = merged.features.unflatten(0, (hidden.shape[0], -1))
    return torch.cat((hidden[:, :1], patches), dim=1)


def grid_tokens(
    merged: MergedTokens, attention: Tensor, dominant: int, newline: Tensor, columns: int, official: bool = False
) -> Tensor:
    """Lay the tokens of `compress_frames` out on their grid, with a newline behind every row (form B, step 5).

    Parameters
    ----------
    merged : MergedTokens
        Result of `compress_frames` with the flat layout.
    attention : Tensor
        ``[F, N]`` as given to it.
    dominant : int
        As given to it.
    newline : Tensor
        ``[D]``.
    columns : int
        Patches per row; rows that hold no token have a newline too.
    official : bool
        Reproduce the video port, which pairs the dominant features in raster order with their places in order
        of attention, so that tokens stand in wrong rows.

    Returns
    -------
    Tensor
        ``[F * (dominant + contextual + rows), D]``, frame by frame and row by row.
    """
    frames, patches = attention.shape
    place = (merged.source % patches).view(frames, -1).clone()
    if official:
        place[:, :dominant] = top_indices(as_float32(attention), dominant, order="rank")
    start = torch.arange(frames, device=place.device).unsqueeze(1) * patches
    place = (place + start).flatten()
    # Twice the place leaves room for a newline just behind the last patch of its row.
    ends = torch.arange(columns - 1, frames * patches, columns, device=place.device)
    key = torch.cat((place * 2, ends * 2 + 1))
    tokens = torch.cat((merged.features, newline.to(merged.features).expand(ends.numel(), -1)))
    return tokens[key.sort(stable=True).indices]


@register
@dataclass
class VisionZip(Method):
    """VisionZip: dominant and contextual tokens of every view.

    Parameters
    ----------
    dominant_share
        Share of the kept tokens that are dominant, 54/64 in the video port.
    context_merge
        See `context_weights`.
    """

    dominant_share: float = DOMINANT_SHARE
    context_merge: ContextMerge = "added"

    name: ClassVar[str] = "visionzip"
    title: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    venue: ClassVar[str] = "CVPR 2025"
    code: ClassVar[str] = "https://github.com/dvlab-research/VisionZip"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    causal: ClassVar[bool] = True
    uniform_views: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "exact in the video form (LLaVA-OneVision, LLaVA-Video); CLIP hosts merge behind the projector instead of in "
        "front of it and drop the class token; use on patch-merging towers is inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        split_budget(1, self.dominant_share)
        if self.context_merge not in get_args(ContextMerge):
            raise MethodError(f"context merge '{self.context_merge}' is unknown; use 'added' or 'mean'.")

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention and keys of the projected layer; the class token's row where there is one."""
        return self._attention(facts), "encoder.mean_key@feature"

    def _attention(self, facts: HostFacts) -> str:
        return f"encoder.{'class' if facts.has_class_token else 'received'}_attention@feature"

    def token_count(self, layout: Layout) -> int:
        """``round(N * retention)`` of every view, at least one."""
        return sum(keep_count(size, self.retention) for size in layout.patches_per_view.tolist())

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Compress all frames at once."""
        assert sample.facts is not None
        features = sample.by_frame
        frames, patches = features.shape[:2]
        dominant, contextual = split_budget(keep_count(patches, self.retention), self.dominant_share)
        attention = sample.signal(self._attention(sample.facts)).view(frames, patches)
        merged = compress_frames(
            features,
            attention,
            sample.signal("encoder.mean_key@feature").view(frames, patches, -1),
            dominant,
            min(contextual, patches - dominant),
            context_merge=self.context_merge,
            layout="grid" if sample.layout.has_row_separators else "flat",
        )
        info = {"token_score": attention.detach().cpu()}
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, info=info)
