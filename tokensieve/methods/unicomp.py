"""UniComp: fuse frames that say the same, then keep the most unique tokens of each and merge their likes.

Based on "UniComp: Rethinking Video Compression Through Informational Uniqueness" (arXiv 2512.03575, CVPR
2026). Uniqueness is one minus a cosine. Runs of frames close to their first one are averaged (frame group
fusion), the budget is split by frame uniqueness (token allocation), and inside a fused frame tokens are taken
from the most to the least unique, each absorbing what lies near it (spatial dynamic compression).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokensieve.core.guided import PairedMethod, ReadingMethod
from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import check_retention
from tokensieve.ops.frame_groups import fuse_frames, over_frames
from tokensieve.ops.merge import MergedTokens, MergeMap
from tokensieve.ops.similarity import as_float32, unit_vectors
from tokensieve.ops.unique_cover import TOKEN_RADIUS, cover_tokens, truncate

FRAME_RADIUS = 0.005
VECTORS = "encoder.head_vector@feature"
NEWLINE = "prompt.newline"
KEYS = "encoder.mean_key@feature"

Metric = Literal["keys", "features"]
FrameVectors = Literal["head", "mean"]
FrameSeparators = Literal["published", "none"]


class Compressed(NamedTuple):
    """Result of `compress`.

    Attributes
    ----------
    merged : MergedTokens
        Output tokens; each stands at its own patch in the first frame of its group.
    starts : Tensor
        ``[g]`` first frame of each group of fused frames.
    budgets : Tensor
        ``[g]`` tokens allocated to each fused frame before unused places are handed on.
    kept : Tensor
        ``[g]`` tokens kept of each fused frame.
    early : bool
        Whether fusing frames was enough, so that every fused token is kept.
    """

    merged: MergedTokens
    starts: Tensor
    budgets: Tensor
    kept: Tensor
    early: bool


def group_frames(
    features: Tensor, retention: float, radius: float = FRAME_RADIUS, *, automatic: bool = False
) -> Tensor:
    """First frame of every group of frames to be fused (step 1).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    retention : float
        R; a group has at most ``floor(1 / R) + 1`` frames.
    radius : float
        Largest uniqueness, one minus the cosine of the mean tokens of a frame and of the first frame of its
        group, with which the frame joins.
    automatic : bool
        No limit to the size of a group.

    Returns
    -------
    Tensor
        ``[g]`` int64 on the CPU, ascending, beginning with 0.
    """
    means = unit_vectors(as_float32(features).mean(dim=1))
    uniqueness: list[list[float]] = (1 - means @ means.T).tolist()
    most = math.inf if automatic else math.floor(1 / check_retention(retention)) + 1
    starts = [0]
    for frame in range(1, len(uniqueness)):
        if uniqueness[frame][starts[-1]] > radius or frame - starts[-1] >= most:
            starts.append(frame)
    return torch.tensor(starts)


def allocate_tokens(frame_vectors: Tensor, budget: int, tokens: int, *, automatic: bool = False) -> Tensor:
    """Split a budget over the fused frames by their uniqueness (step 3).

    Parameters
    ----------
    frame_vectors : Tensor
        ``[g, d]`` one vector for each fused frame.
    budget : int
        Number of tokens B for the whole video.
    tokens : int
        N, tokens of a frame.
    automatic : bool
        Give every frame ``floor(B / g)``.

    Returns
    -------
    Tensor
        ``[g]`` int64 on the CPU, each at most ``min(N, max(1, 2 floor(B / g)))`` and together at most B. A
        budget below the number of frames goes to the most unique ones, one token each (ours).
    """
    frames = frame_vectors.shape[0]
    units = unit_vectors(frame_vectors)
    typical = (units @ units.T).mean(dim=1)
    share = torch.softmax((typical.mean() - typical) * math.sqrt(frames), dim=0).cpu()
    cap = min(tokens, max(1, budget // frames * 2))
    if automatic:
        counts = torch.full((frames,), budget // frames)
    elif frames <= budget // cap:
        counts = torch.full((frames,), cap)
    else:
        counts = _capped(share * budget, cap, budget)
    if not bool(counts.any()):
        counts[share.sort(descending=True, stable=True).indices[: max(1, budget)]] = 1
    return counts


def _capped(shares: Tensor, cap: int, budget: int) -> Tensor:
    """Shares rounded down and cut at ``cap``; what that frees goes in equal parts to the frames below it."""
    counts = shares.floor().long()
    over = counts > cap
    counts = counts.clamp_max(cap)
    while bool(over.any()) and not bool(over.all()):
        part = max(0, budget - int(counts.sum())) // int((~over).sum())
        if part == 0:
            break
        counts[~over] += part
        over = counts > cap
        counts = counts.clamp_max(cap)
    return counts


def compress(
    features: Tensor,
    retention: float,
    *,
    keys: Tensor | None = None,
    frame_vectors: Tensor | None = None,
    frame_radius: float = FRAME_RADIUS,
    token_radius: float = TOKEN_RADIUS,
    automatic: bool = False,
    official: bool = False,
) -> Compressed:
    """The whole method on one video (steps 1 to 6, without separators).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features.
    retention : float
        R, upper bound of the share of tokens that survive; redundant videos keep fewer.
    keys : Tensor, optional
        ``[F, N, d]`` vectors for the similarity of tokens, for example encoder keys; the features by default.
    frame_vectors : Tensor, optional
        ``[F, d]`` global vectors of the frames; by default the mean tokens of the fused frames.
    frame_radius, token_radius
        U_f and U_c, see ``group_frames`` and ``cover_tokens``.
    automatic : bool
        Groups without limit and the same budget for all fused frames (AUTO of the released code).
    official : bool
        Without ``frame_vectors``, average fused frames over the channels, as the released code does, not over
        the tokens.

    Returns
    -------
    Compressed
        See there.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    MethodError
        If the features are not ``[F, N, D]``.
    """
    if features.dim() != 3:
        raise MethodError(f"UniComp needs features [F, N, D], but the shape is {tuple(features.shape)}.")
    frames, tokens, _ = features.shape
    budget = max(1, math.floor(check_retention(retention) * frames * tokens))
    starts = group_frames(features, retention, frame_radius, automatic=automatic)
    anchors = starts.to(features.device)
    fused = fuse_frames(features, starts)
    if fused.shape[0] * tokens <= budget and not automatic:
        budgets = torch.full((fused.shape[0],), tokens)
        every = torch.ones(fused.shape[:2], dtype=torch.bool, device=features.device)
        return Compressed(_merged(fused, None, every, starts, frames), starts, budgets, budgets, True)
    if frame_vectors is not None:
        vectors = frame_vectors[anchors.to(frame_vectors.device)]
    else:
        vectors = as_float32(fused).mean(dim=-1 if official else 1)
    budgets = allocate_tokens(vectors, budget, tokens, automatic=automatic)
    near, order, chosen = cover_tokens((features if keys is None else keys)[anchors], token_radius)
    keep = truncate(chosen, order, budgets)
    return Compressed(_merged(fused, near, keep, starts, frames), starts, budgets, keep.sum(1).cpu(), False)


def _merged(fused: Tensor, near: Tensor | None, keep: Tensor, starts: Tensor, frames: int) -> MergedTokens:
    """Values of the kept tokens ``[g, N]``: half their own, half the mean of the original tokens near them."""
    tokens = fused.shape[1]
    group, patch = keep.nonzero(as_tuple=True)
    sizes = torch.diff(starts, append=torch.tensor([frames])).to(keep.device)[group]
    source = starts.to(keep.device)[group] * tokens + patch
    target = torch.arange(group.numel(), device=keep.device)
    if near is None:
        alone = MergeMap(source, target, torch.ones_like(target, dtype=torch.float32))
        return MergedTokens(fused.flatten(0, 1), source, over_frames(alone, sizes, tokens))
    members = near[group, patch]
    found = members.sum(dim=1)
    # A radius of 0 leaves a token without neighbours, itself included.
    own_weight = torch.where(found > 0, 0.5, 1.0)
    other_weight = 0.5 / found.clamp_min(1)
    values = []
    per_frame = keep.sum(dim=1).tolist()
    for frame, part, own, own_share, share in zip(
        fused, *(x.split(per_frame) for x in (members, patch, own_weight, other_weight)), strict=True
    ):
        work = as_float32(frame)
        weights = part.to(work.dtype) * share.unsqueeze(1)
        values.append(weights @ work + work[own] * own_share.unsqueeze(1))
    slot, member = members.nonzero(as_tuple=True)
    merge_map = MergeMap(
        torch.cat((source, source[slot] - patch[slot] + member)),
        torch.cat((target, slot)),
        torch.cat((own_weight, other_weight[slot])),
    )
    spread = over_frames(merge_map, torch.cat((sizes, sizes[slot])), tokens)
    return MergedTokens(torch.cat(values).to(fused.dtype), source, spread)


@register
@dataclass
class UniComp(PairedMethod, ReadingMethod):
    """UniComp; redundant videos keep fewer tokens than the retention allows.

    Parameters
    ----------
    metric
        Similarity of tokens between ``"keys"`` of the last used encoder layer, mean over heads (recommended by
        the authors), or between ``"features"``.
    frame_vectors
        Uniqueness of frames between what SigLIP's pooling head makes of them (``"head"``, as in the published
        figures; the head is loaded beside the host), or between mean tokens (``"mean"``). None takes the head on
        SigLIP towers of a known pair and wherever ``text_tower`` is given.
    separators
        ``"published"`` puts a separator behind every fused frame, a newline embedding of the host's grid or else that
        of a line break; ``"none"`` puts none.
    text_tower, tokenizer
        See `PairedMethod` and `ReadingMethod`.
    frame_radius, token_radius
        Uniqueness up to which a frame joins a group, and below which a token is absorbed.
    automatic
        AUTO of the released code: groups without limit, equal budgets.
    official
        Take frame uniqueness from channel averages, as the released code does when it has no global frame
        vectors.
    """

    metric: Metric = "keys"
    frame_vectors: FrameVectors | None = None
    separators: FrameSeparators = "published"
    frame_radius: float = FRAME_RADIUS
    token_radius: float = TOKEN_RADIUS
    automatic: bool = False
    official: bool = False

    name: ClassVar[str] = "unicomp"
    title: ClassVar[str] = "UniComp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.03575"
    venue: ClassVar[str] = "CVPR 2026"
    code: ClassVar[str] = "https://github.com/TimeMarker-LLM/UniComp"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    fidelity_note: ClassVar[str] = (
        "exact with SigLIP towers of a known pair; elsewhere frame uniqueness is measured between mean tokens"
    )
    uniform_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token_radius >= 0:
            raise MethodError(f"token_radius is {self.token_radius}, but it must be at least 0; published is 0.2.")
        if self.metric not in get_args(Metric):
            raise MethodError(f"metric {self.metric!r} is unknown; use 'keys' or 'features'.")
        if self.frame_vectors is not None and self.frame_vectors not in get_args(FrameVectors):
            raise MethodError(f"frame_vectors {self.frame_vectors!r} is unknown; use 'head' or 'mean'.")
        if self.separators not in get_args(FrameSeparators):
            raise MethodError(f"separators {self.separators!r} is unknown; use 'published' or 'none'.")

    def _vectors(self, facts: HostFacts | None) -> FrameVectors:
        if self.frame_vectors is not None:
            return self.frame_vectors
        known = facts is not None and facts.tower_pair == "siglip" and facts.text_tower is not None
        return "head" if known or self.text_tower is not None else "mean"

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Mean keys of the last used layer, frame vectors of the pooling head, and a line break, as options ask."""
        wanted: tuple[str, ...] = (KEYS,) if self.metric == "keys" else ()
        if self._vectors(facts) == "head":
            wanted += (VECTORS,)
        return (*wanted, NEWLINE) if self.separators == "published" and facts.video_separators != "row" else wanted

    def token_count(self, layout: Layout) -> int | None:
        """Depends on how redundant the video is."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Steps 1 to 6 on one video (or one picture as a video of one frame)."""
        features = sample.by_frame
        result = compress(
            features,
            self.retention,
            keys=sample.signal(KEYS).to(features.device).view(*features.shape[:2], -1)
            if self.metric == "keys"
            else None,
            frame_vectors=sample.signal(VECTORS) if self._vectors(sample.facts) == "head" else None,
            frame_radius=self.frame_radius,
            token_radius=self.token_radius,
            automatic=self.automatic,
            official=self.official,
        )
        merged, starts = result.merged, result.starts
        info = {"group_start": starts, "group_budget": result.budgets, "group_count": result.kept}
        plan = Plan(merged.source, merged.features, merged.merge_map, self.position_policy, info=info)
        if sample.layout.kind == "image":
            return plan
        if result.early or self.separators == "none":
            # None are left where fusing frames was enough, but for the host's own behind the video.
            plan.views = starts[:0]
            return plan
        plan.separators = "per-group"
        plan.groups = torch.arange(starts.numel()).repeat_interleave(result.kept)
        newline = sample.signals.get(NEWLINE)
        # Vocabularies of words alone have no line break, and then there is nothing to put in.
        plan.separator = newline if newline is not None and newline.numel() else None
        return plan
