"""What PruneVid does in front of the LLM: scenes, patches that stand still averaged over time, and clusters in space.

Based on "PruneVid: Visual Token Pruning for Efficient Video Large Language Models" (arXiv 2412.16117, ACL Findings
2025). Frames are clustered into scenes; patches that hardly change inside a scene are averaged over its frames, and
both these and the others are clustered in space.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Fidelity, Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.merge import MergedTokens, MergeMap, join_merged, mean_merge
from tokensieve.ops.peaks import peak_clusters
from tokensieve.ops.similarity import as_float32, unit_vectors

SCENES = 0.25
STATIC = 0.8
CLUSTERS = 0.5
NEIGHBOURS = 7
SMALL = 14

Segments = list[tuple[int, int]]


class Scenes(NamedTuple):
    """Segments of a video and what stands still in them.

    Attributes
    ----------
    segments : list of (int, int)
        First and last frame of every segment.
    static : Tensor
        ``[S, N]`` bool: the patch hardly changes through the segment.
    """

    segments: Segments
    static: Tensor

    def groups(self) -> list[tuple[int, int]]:
        """Size of every group that is clustered on its own, and how often it occurs."""
        tokens = self.static.shape[1]
        found = []
        for (first, last), still in zip(self.segments, self.static.sum(dim=1).tolist(), strict=True):
            found += [(still, 1), (tokens - still, last - first + 1)]
        return found


def frame_labels(features: Tensor, scenes: float = SCENES, neighbours: int = NEIGHBOURS) -> Tensor:
    """Cluster of every frame by its mean token (step 1).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    scenes : float
        gamma: ``int(F gamma)`` clusters, at least one.
    neighbours : int
        k of the density, limited by the number of frames.

    Returns
    -------
    Tensor
        ``[F]`` int64, numbered from the best centre on.
    """
    means = as_float32(features).mean(dim=1)
    return peak_clusters(means[None], max(1, int(features.shape[0] * scenes)), neighbours).assignment[0]


def refine_labels(labels: Sequence[int]) -> list[int]:
    """Labels without stray frames (step 2).

    Of every label only its longest runs stay, and none if they are single frames. Each gap takes the label of the
    longer run beside it, from left to right; the left one wins ties, and 0 is taken where there is neither.

    Parameters
    ----------
    labels : sequence of int
        Cluster of every frame.

    Returns
    -------
    list of int
        Same length.
    """
    runs = [(label, len(list(group))) for label, group in itertools.groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 0))
    kept = [(label if length == longest[label] > 1 else None, length) for label, length in runs]
    refined: list[list[int]] = []
    gaps = [(label, sum(n for _, n in group)) for label, group in itertools.groupby(kept, key=lambda run: run[0])]
    for place, (label, length) in enumerate(gaps):
        chosen = label
        if chosen is None:
            left = refined[-1] if refined else [0, 0]
            right_label, right = gaps[place + 1] if place + 1 < len(gaps) else (0, 0)
            chosen = left[0] if left[1] >= right or right_label is None else right_label
        if refined and refined[-1][0] == chosen:
            refined[-1][1] += length
        else:
            refined.append([chosen, length])
    return [label for label, length in refined for _ in range(length)]


def find_scenes(
    features: Tensor, scenes: float = SCENES, threshold: float = STATIC, neighbours: int = NEIGHBOURS
) -> Scenes:
    """Segments and static patches of a video (steps 1 to 3).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    scenes, neighbours
        See `frame_labels`.
    threshold : float
        tau: a patch is static if the mean cosine over all pairs of frames of its segment is above it.

    Returns
    -------
    Scenes
        Nothing is static in segments of one frame.
    """
    refined = refine_labels(frame_labels(features, scenes, neighbours).tolist())
    lengths = [len(list(group)) for _, group in itertools.groupby(refined)]
    ends = list(itertools.accumulate(lengths))
    segments = [(end - length, end - 1) for end, length in zip(ends, lengths, strict=True)]
    static = torch.zeros(len(segments), features.shape[1], dtype=torch.bool, device=features.device)
    for number, (first, last) in enumerate(segments):
        frames = last - first + 1
        if frames > 1:
            # The sum of all pairwise cosines is the squared length of the summed unit vectors.
            total = unit_vectors(features[first : last + 1]).sum(dim=0).square().sum(dim=-1)
            static[number] = (total - frames) / (frames * (frames - 1)) > threshold
    return Scenes(segments, static)


def group_clusters(size: int, ratio: float, small: int = SMALL) -> int:
    """Tokens that a group of patches becomes: ``int(size beta)``, at least one; small groups stay as they are."""
    return max(1, int(size * ratio)) if size > small else size


def ratio_for_budget(scenes: Scenes, target: int) -> tuple[float, int]:
    """Cluster ratio and size limit that come closest to a number of tokens from below (ours).

    Parameters
    ----------
    scenes : Scenes
        Of the video.
    target : int
        Largest total wanted.

    Returns
    -------
    ratio : float
        The largest beta whose total is at most the target, or 0 if there is none.
    small : int
        Groups up to this size are not clustered: the published 14 where the target can be met with it, else 0.
    """
    groups = scenes.groups()

    def total(ratio: float, small: int) -> int:
        return sum(times * group_clusters(size, ratio, small) for size, times in groups if size)

    small = SMALL if total(0.0, SMALL) <= target else 0
    low, high = 0.0, 1.0
    if total(high, small) <= target:
        return high, small
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle, small) <= target else (low, middle)
    return low, small


def merge_scenes(
    features: Tensor, scenes: Scenes, ratio: float = CLUSTERS, *, small: int = SMALL, neighbours: int = NEIGHBOURS
) -> tuple[MergedTokens, list[int], list[int]]:
    """Average static patches over time and cluster all patches in space (steps 4 to 6).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    scenes : Scenes
        Of `find_scenes`.
    ratio : float
        beta, see `group_clusters`.
    small : int
        Groups up to this size stay as they are.
    neighbours : int
        k of the density.

    Returns
    -------
    merged : MergedTokens
        Per segment the static tokens, then the others frame by frame, clusters from the best centre on. A static
        token stands at its centre's patch in the first frame of the segment.
    static_sizes, dynamic_sizes : list of int
        Tokens of both kinds for every segment.
    """
    tokens = features.shape[1]
    parts: list[MergedTokens] = []
    sizes: tuple[list[int], list[int]] = ([], [])
    for (first, last), static in zip(scenes.segments, scenes.static, strict=True):
        inside = as_float32(features[first : last + 1])
        frame = torch.arange(first, last + 1, device=features.device).unsqueeze(1) * tokens
        still, moving = static.nonzero()[:, 0], (~static).nonzero()[:, 0]
        # [copies in time, frames, patches]: a static token stands for its patch in all frames.
        means = inside[:, still].mean(dim=0, keepdim=True)
        groups = ((means, (frame + still).unsqueeze(1)), (inside[:, moving], (frame + moving).unsqueeze(0)))
        for emitted, (values, source) in zip(sizes, groups, strict=True):
            clusters = group_clusters(values.shape[1], ratio, small) if values.shape[1] else 0
            emitted.append(clusters * values.shape[0])
            if clusters:
                parts.append(_cluster_groups(values, source, clusters, neighbours))
    merged = join_merged(parts)
    return merged._replace(features=merged.features.to(features.dtype)), *sizes


def _cluster_groups(values: Tensor, source: Tensor, clusters: int, neighbours: int) -> MergedTokens:
    """Cluster means of groups ``values [G, n, D]`` whose entries are the mean of tokens ``source [T, G, n]``."""
    count, size, _ = values.shape
    if clusters == size:
        centres = assignment = torch.arange(size, device=values.device).expand(count, -1)
    else:
        centres, assignment = peak_clusters(values, clusters, neighbours)
    target = (torch.arange(count, device=values.device).unsqueeze(1) * clusters + assignment).flatten()
    features = mean_merge(values.flatten(0, 1), target, count * clusters)
    copies = source.shape[0]
    weight = 1 / (torch.bincount(target, minlength=count * clusters)[target] * copies)
    merge_map = MergeMap(source.flatten(), target.repeat(copies), weight.float().repeat(copies))
    return MergedTokens(features, source[0].gather(1, centres).flatten(), merge_map)


@register
@dataclass
class PruneVidMerge(Method):
    """The part of PruneVid in front of the LLM, as tables of tokens in front of the LLM compare it.

    Parameters
    ----------
    retention
        Share of the tokens that enter the LLM at most. The cluster ratio is chosen for it, see `ratio_for_budget`; one
        token per group is left at least.
    cluster_ratio
        beta, in place of the retention; the published value is 0.5.
    scenes, threshold, neighbours
        See `find_scenes`.
    """

    cluster_ratio: float | None = None
    scenes: float = SCENES
    threshold: float = STATIC
    neighbours: int = NEIGHBOURS

    name: ClassVar[str] = "prunevid-merge"
    title: ClassVar[str] = "PruneVid (merging)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.16117"
    venue: ClassVar[str] = "ACL Findings 2025"
    code: ClassVar[str] = "https://github.com/Visual-AI/PruneVid"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    uniform_views: ClassVar[bool] = True
    fidelity: ClassVar[Fidelity] = "mostly"
    fidelity_note: ClassVar[str] = (
        "without the selection inside the LLM; meeting a retention and places of merged tokens on hosts other than "
        "PLLaVA are inferred"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("cluster_ratio", "scenes"):
            value = getattr(self, option)
            if value is not None and not 0.0 < value <= 1.0:
                raise MethodError(f"{option} is {value}, but it must be above 0 and at most 1.")
        if self.neighbours < 1:
            raise MethodError(f"neighbours is {self.neighbours}, but it must be at least 1; the published value is 7.")

    def token_count(self, layout: Layout) -> int | None:
        """Depends on how static the video is."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Scenes and merged tokens of one video (or one picture as a video of one frame)."""
        features = sample.by_frame
        found = find_scenes(features, self.scenes, self.threshold, self.neighbours)
        ratio, small = self.cluster_ratio, SMALL
        if ratio is None:
            ratio, small = ratio_for_budget(found, keep_count(sample.layout.patches, self.retention))
        merged, *sizes = merge_scenes(features, found, ratio, small=small, neighbours=self.neighbours)
        info = {"segments": torch.tensor(found.segments), "static": found.static, "cluster_ratio": ratio}
        plan = Plan(merged.source, merged.features, merged.merge_map, self.position_policy, "occupied", info=info)
        if sample.layout.kind == "video":
            # Merged tokens have no grid row: one newline of those that the host has stays behind every segment.
            per_segment = torch.tensor(sizes).sum(0)
            plan.separators = "per-group"
            plan.groups = torch.arange(per_segment.numel()).repeat_interleave(per_segment)
        return plan
