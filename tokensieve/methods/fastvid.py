"""FastVID: segments of similar frames, salient tokens of every frame, density peaks that absorb the rest.

Based on "FastVID: Dynamic Density Pruning for Fast Video Large Language Models" (arXiv 2503.11187, NeurIPS 2025).
The three released copies of the code differ in how they spread budgets and in which tokens are merged; they are the
``flavour`` of the functions here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokensieve.core.guided import PairedMethod
from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan, Positions
from tokensieve.core.registry import register
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import check_retention
from tokensieve.ops.cluster import scaled_distances
from tokensieve.ops.merge import MergedTokens, MergeMap, join_merged, sort_merged, unmerged
from tokensieve.ops.peaks import peak_scores
from tokensieve.ops.select import top_mask
from tokensieve.ops.similarity import as_float32, unit_vectors
from tokensieve.ops.transitions import segment_transitions, transition_similarity

SEGMENTS = 8
CONTEXT = 0.4
STRIDE = 4
BETA = 0.6
NEIGHBOURS = 4
IGNORE = 0.95
HEAD_ATTENTION = "encoder.head_attention@feature"
HEAD_VECTOR = "encoder.head_vector@feature"
MEAN_QUERY = "encoder.mean_query_attention@last"
RECEIVED = "encoder.received_attention@feature"

Flavour = Literal["onevision", "llava_video", "qwen"]


def frame_budgets(
    length: int,
    tokens: int,
    retention: float,
    *,
    flavour: Flavour = "onevision",
    context: float = CONTEXT,
    stride: int = STRIDE,
    valid: int | None = None,
) -> tuple[list[int], list[int]]:
    """Salient tokens and context anchors of every frame of a segment (steps 2 and 3).

    Parameters
    ----------
    length : int
        L, frames of the segment.
    tokens : int
        N, tokens per frame.
    retention : float
        R in (0, 1]; a frame counts for ``floor(N R)`` tokens, at least one.
    flavour : {"onevision", "llava_video", "qwen"}
        ``onevision`` splits the budget of a frame and loses the remainder of the anchors; the others split the
        budget of the segment and deal remainders out.
    context : float
        Share d of the budget for context anchors.
    stride : int
        Every p-th frame counted from the last one holds anchors.
    valid : int, optional
        Frames of the segment that may hold tokens (``qwen``); all by default.

    Returns
    -------
    salient, anchors : list of int
        One number per valid frame; frames without anchors have 0. A frame never has more than N tokens.
    """
    places = length if valid is None else valid
    rate = max(1, math.floor(tokens * retention))
    holds = [(places - 1 - i) % stride == 0 for i in range(places)]
    holders = sum(holds)
    if flavour == "onevision":
        shared = math.floor(rate * context)
        salient = [rate - shared] * places
        dealt = [shared * length // holders] * holders
    else:
        shared = max(math.floor(rate * length * context), 1 if flavour == "qwen" else 0)
        base, extra = divmod(rate * length - shared, places)
        salient = [base + (i < extra) for i in range(places)]
        base, extra = divmod(shared, holders)
        dealt = [base + (i < extra) for i in reversed(range(holders))]
    queue = iter(dealt)
    anchors = [next(queue) if has else 0 for has in holds]
    if flavour == "qwen":
        anchors = [min(count, max(1, tokens // 2)) for count in anchors]
        return [min(s, tokens - a) for s, a in zip(salient, anchors, strict=True)], anchors
    salient = [min(count, tokens) for count in salient]
    return salient, [min(a, tokens - s) for s, a in zip(salient, anchors, strict=True)]


def valid_frames(similarity: Tensor, segment: tuple[int, int], ignore: float = IGNORE) -> list[int]:
    """Frames of a segment that differ from the frame behind them, and its last frame (``qwen``).

    Parameters
    ----------
    similarity : Tensor
        ``[F-1]`` cosine of each frame vector with the next one.
    segment : (int, int)
        First and last frame.
    ignore : float
        A frame holds tokens if its similarity to the next one is below this.

    Returns
    -------
    list of int
        Ascending.
    """
    first, last = segment
    return [first + i for i in (similarity[first:last] < ignore).nonzero()[:, 0].tolist()] + [last]


def density_pruning(
    features: Tensor,
    saliency: Tensor,
    frame_vectors: Tensor,
    retention: float,
    *,
    flavour: Flavour = "onevision",
    segments: int = SEGMENTS,
    threshold: float = 0.9,
    context: float = CONTEXT,
    stride: int = STRIDE,
    beta: float = BETA,
    ignore: float = IGNORE,
    strict: bool = False,
) -> tuple[MergedTokens, list[tuple[int, int]]]:
    """The whole method on one video (steps 1 to 7).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features.
    saliency : Tensor
        ``[F, N]``; the largest are kept unmodified.
    frame_vectors : Tensor
        ``[F, G]`` global vector of every frame, for the segmentation.
    retention : float
        R in (0, 1].
    flavour : {"onevision", "llava_video", "qwen"}
        Which released copy to follow, see `frame_budgets`. In ``onevision`` anchors are merged into themselves, in
        the others the anchors of the same frame are left out, and ``qwen`` passes over frames that hardly differ
        from the next one.
    segments : int
        Smallest number c of segments.
    threshold : float
        Cosine of consecutive frame vectors below which a segment ends.
    context, stride
        See `frame_budgets`.
    beta : float
        Smallest weight of an anchor in its merged token.
    ignore : float
        See `valid_frames`; for ``qwen`` only.
    strict : bool
        Tokens of equal density as in the released code without its random noise, see `peak_scores`.

    Returns
    -------
    merged : MergedTokens
        Salient tokens and merged anchors by ascending ``frame * N + patch``.
    segments : list of (int, int)
        First and last frame of every segment.

    Raises
    ------
    RetentionError
        If the retention is outside (0, 1].
    MethodError
        If shapes do not match or the flavour is unknown.
    """
    check_retention(retention)
    if features.dim() != 3 or saliency.shape != features.shape[:2] or frame_vectors.shape[:1] != features.shape[:1]:
        raise MethodError(
            f"FastVID needs features [F, N, D], saliency [F, N] and frame vectors [F, G], but the shapes are "
            f"{tuple(features.shape)}, {tuple(saliency.shape)} and {tuple(frame_vectors.shape)}."
        )
    if flavour not in get_args(Flavour):
        raise MethodError(f"flavour '{flavour}' is unknown; use one of {', '.join(get_args(Flavour))}.")
    frames, tokens, _ = features.shape
    similarity = transition_similarity(frame_vectors)
    parts = segment_transitions(similarity, threshold, segments)
    salient_counts, anchor_counts = torch.zeros(2, frames, dtype=torch.int64, device=features.device)
    for first, last in parts:
        places = valid_frames(similarity, (first, last), ignore) if flavour == "qwen" else range(first, last + 1)
        salient_count, anchor_count = frame_budgets(
            last - first + 1,
            tokens,
            retention,
            flavour=flavour,
            context=context,
            stride=stride,
            valid=len(places),
        )
        where = torch.tensor(list(places), device=features.device)
        salient_counts[where] = torch.tensor(salient_count, device=features.device)
        anchor_counts[where] = torch.tensor(anchor_count, device=features.device)
    salient = top_mask(saliency, salient_counts)
    anchors = torch.zeros_like(salient)
    holders = anchor_counts.nonzero()[:, 0]
    if holders.numel():
        free = ~salient[holders]
        scores = peak_scores(scaled_distances(features[holders]), NEIGHBOURS, free, strict=strict)
        anchors[holders] = top_mask(scores, anchor_counts[holders])
    pieces = [unmerged(features.flatten(0, 1), salient.flatten().nonzero()[:, 0])]
    for first, last in parts:
        pieces += _absorb(features, salient, anchors, (first, last), beta, flavour == "onevision")
    return sort_merged(join_merged(pieces)), parts


def _absorb(
    features: Tensor, salient: Tensor, anchors: Tensor, segment: tuple[int, int], beta: float, with_anchors: bool
) -> list[MergedTokens]:
    """Average the other tokens of a segment into the anchors of each of its anchor frames (step 6)."""
    first, last = segment
    tokens = features.shape[1]
    inside = slice(first, last + 1)
    if not bool(anchors[inside].any()):
        return []
    others = (~salient[inside]).flatten().nonzero()[:, 0]
    is_anchor = anchors[inside].flatten()[others]
    frame = torch.div(others, tokens, rounding_mode="floor")
    work = as_float32(features[inside].flatten(0, 1)[others])
    merged = []
    for holder in frame[is_anchor].unique().tolist():
        own = (is_anchor & (frame == holder)).nonzero()[:, 0]
        # The length of a token changes nothing in which anchor is nearest to it.
        joined = (unit_vectors(work[own]) @ work.T).argmax(dim=0)
        weight = torch.zeros(own.numel(), others.numel(), dtype=work.dtype, device=work.device)
        weight[joined, torch.arange(others.numel(), device=work.device)] = 1.0
        if not with_anchors:
            weight[:, own] = 0.0
        size = weight.sum(dim=1)
        anchor_weight = torch.where(size > 0, (1 / (size + 1)).clamp_min(beta), torch.ones_like(size))
        weight *= ((1 - anchor_weight) / size.clamp_min(1)).unsqueeze(1)
        weight[torch.arange(own.numel(), device=work.device), own] += anchor_weight
        target, source = weight.nonzero().unbind(1)
        merge_map = MergeMap(first * tokens + others[source], target, weight[target, source].float())
        # Float32 sums over a whole segment lose digits; sums of blocks do not.
        mixed = torch.zeros_like(work[own])
        for part, block in zip(weight.split(256, 1), work.split(256), strict=True):
            mixed += part @ block
        merged.append(MergedTokens(mixed.to(features.dtype), first * tokens + others[own], merge_map))
    return merged


@dataclass
class _DensityPruning(Method):
    """What both registered methods share: options, and the way from signals to a plan."""

    flavour: Flavour | None = None
    segments: int = SEGMENTS
    threshold: float | None = None
    context: float = CONTEXT
    stride: int = STRIDE
    beta: float = BETA
    ignore: float = IGNORE

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.11187"
    venue: ClassVar[str] = "NeurIPS 2025"
    code: ClassVar[str] = "https://github.com/LunarShen/FastVID"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    uniform_views: ClassVar[bool] = True
    published_positions: ClassVar[Positions] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flavour is not None and self.flavour not in get_args(Flavour):
            raise MethodError(f"flavour '{self.flavour}' is unknown; use one of {', '.join(get_args(Flavour))}.")
        if self.stride < 1 or not 0.0 <= self.context < 1.0:
            raise MethodError(
                f"stride is {self.stride} and context {self.context}, but the stride must be at least 1 and the "
                "context share at least 0 and below 1; the published values are 4 and 0.4."
            )

    def token_count(self, layout: Layout) -> int | None:
        """Depends on the segments."""
        return None

    def measures(self, sample: TokenSample) -> tuple[Tensor, Tensor]:
        """Saliency ``[n]`` of the patches and vectors ``[F, G]`` of the frames of a sample."""
        raise MethodError(f"{self.name} measures nothing.")

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Segments, salient tokens and merged anchors of one video (or one picture as a single frame)."""
        features = sample.by_frame
        saliency, vectors = (part.to(features.device) for part in self.measures(sample))
        flavour = self.flavour or _host_flavour(sample.facts)
        threshold = self.threshold
        if threshold is None:
            threshold = 0.84 if flavour == "qwen" else 0.9
        merged, segments = density_pruning(
            features,
            saliency.view(features.shape[:2]),
            vectors,
            self.retention,
            flavour=flavour,
            segments=self.segments,
            threshold=threshold,
            context=self.context,
            stride=self.stride,
            beta=self.beta,
            ignore=self.ignore,
        )
        info = {"segments": torch.tensor(segments)}
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, "occupied", info=info)


@register
@dataclass
class FastVID(_DensityPruning, PairedMethod):
    """FastVID on the published signals.

    On hosts with a SigLIP tower both come from SigLIP's attention-pooling head, which their checkpoints leave out, so
    that it is loaded beside them: saliency is the attention of the head's probe to the patches, a frame vector what
    the head makes of the frame. On the Qwen families saliency is the attention of a frame's mean query in the last
    tower block, and a frame vector the mean of its tokens.

    Parameters
    ----------
    flavour
        Copy of the released code to follow; None takes that of the host (``onevision`` for hosts without a copy of
        their own, ``qwen`` for the Qwen families).
    threshold
        Cosine below which a segment ends; None takes 0.9, and 0.84 for the ``qwen`` flavour.
    segments, context, stride, beta, ignore
        See `density_pruning`.
    text_tower
        SigLIP model with the pooling head, see `PairedMethod`.
    """

    name: ClassVar[str] = "fastvid"
    title: ClassVar[str] = "FastVID"
    fidelity_note: ClassVar[str] = (
        "as released on LLaVA-OneVision, LLaVA-Video and Qwen2.5-VL; the choice of a released copy for other hosts is "
        "inferred, and the random noise in equal densities is left out"
    )

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """The pooling head, or the mean query where the tower merges patches."""
        return (MEAN_QUERY,) if facts.family.startswith("qwen") else (HEAD_ATTENTION, HEAD_VECTOR)

    def measures(self, sample: TokenSample) -> tuple[Tensor, Tensor]:
        """Published saliency and frame vectors."""
        if MEAN_QUERY in sample.signals:
            return sample.signal(MEAN_QUERY), as_float32(sample.by_frame).mean(dim=1)
        return sample.signal(HEAD_ATTENTION), sample.signal(HEAD_VECTOR)


@register
@dataclass
class FastVIDProxy(_DensityPruning):
    """FastVID on signals that every host has, in place of SigLIP's pooling head.

    Saliency is the mean attention that a patch receives in the last used tower layer, and a frame vector is the mean
    of its projected tokens (the published choice on Qwen2.5-VL). The name says so in every table.

    Parameters
    ----------
    flavour, threshold, segments, context, stride, beta, ignore
        See `FastVID`.
    """

    name: ClassVar[str] = "fastvid-proxy"
    title: ClassVar[str] = "FastVID (proxy signals)"
    fidelity: ClassVar[Fidelity] = "inferred"
    fidelity_note: ClassVar[str] = (
        "saliency is received attention and frame vectors are mean tokens, in place of SigLIP's pooling head"
    )

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """Attention received in the last used tower layer."""
        return (RECEIVED,)

    def measures(self, sample: TokenSample) -> tuple[Tensor, Tensor]:
        """Received attention and mean tokens."""
        return sample.signal(RECEIVED), as_float32(sample.by_frame).mean(dim=1)


def _host_flavour(facts: HostFacts | None) -> Flavour:
    family = facts.family if facts is not None else ""
    if family.startswith("qwen"):
        return "qwen"
    return "llava_video" if family == "llava_video" else "onevision"
