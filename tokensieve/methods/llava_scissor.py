"""LLaVA-Scissor: one token for every semantic region of a video.

Based on "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video LLMs" (arXiv
2506.21862). Tokens whose cosine exceeds a threshold are linked; the connected components of every frame are
averaged, the averages of all frames are linked and averaged again, and finally every original token is
averaged into the nearest result. The threshold decides how many tokens remain; here it is searched for so that
a retention is met, or given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan
from tokensieve.core.registry import register
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.graph import similarity_components
from tokensieve.ops.merge import MergedTokens, MergeMap, mean_merge
from tokensieve.ops.similarity import as_float32, unit_vectors

TAU = 0.9
"""Threshold of the released checkpoint."""
EPSILON = 0.05
TOLERANCE = 0.02
_START = 0.9
_TRIES = 16
_EXACT_TRIES = 6
_SKETCH = 256
_MAX_PAIRS = 4 * 1024 * 1024


class Regions(NamedTuple):
    """Connected components of a video (steps 1 and 2).

    Attributes
    ----------
    label : Tensor
        ``[F, N]`` int64 region of every token inside its frame, counted through the frames.
    joined : Tensor
        ``[n1]`` int64 region of the video that every region of a frame belongs to.
    means : Tensor
        ``[n2, D]`` float32 mean of the means of its regions.
    source : Tensor
        ``[n2]`` int64 token ``frame * N + patch`` that stands for each region of the video, ascending.
    """

    label: Tensor
    joined: Tensor
    means: Tensor
    source: Tensor


def _sample(graphs: int, nodes: int, epsilon: float, generator: torch.Generator | None) -> Tensor:
    """Nodes ``[graphs, nodes]`` bool whose edges the approximate components look at (step a)."""
    size = min(nodes, math.ceil(math.log(nodes) / epsilon**2))
    order = torch.rand(graphs, nodes, generator=generator).argsort(dim=1)
    return torch.zeros(graphs, nodes, dtype=torch.bool).scatter_(1, order[:, :size], True)


def find_regions(
    features: Tensor,
    tau: float = TAU,
    *,
    approximate: bool = False,
    epsilon: float = EPSILON,
    generator: torch.Generator | None = None,
) -> Regions:
    """Semantic regions of every frame, then of the video (steps 1 and 2).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]`` projected and pooled patch features.
    tau : float
        Two vectors are linked if their cosine is strictly above it.
    approximate : bool
        Use only edges at a random sample of ``ceil(ln(n) / epsilon^2)`` nodes of each graph, as the released
        code does; all nodes are in the sample while n is below about 3300. Exact components by default.
    epsilon : float
        Error tolerance of the sample.
    generator : torch.Generator, optional
        Source of the sample, on the CPU.

    Returns
    -------
    Regions
        See there. A region is represented by its member with the most links, and regions are in the order
        of their representatives.

    Raises
    ------
    MethodError
        If the features are not ``[F, N, D]`` or epsilon is not above 0.
    """
    if features.dim() != 3 or not epsilon > 0:
        raise MethodError(
            f"LLaVA-Scissor needs features [F, N, D] and an epsilon above 0, but got {tuple(features.shape)} and "
            f"{epsilon}."
        )
    work = as_float32(features)

    def components(vectors: Tensor) -> tuple[Tensor, Tensor]:
        sampled = None
        if approximate:
            sampled = _sample(vectors.shape[0], vectors.shape[1], epsilon, generator).to(vectors.device)
        return similarity_components(unit_vectors(vectors), tau, sampled=sampled)

    label, source = components(work)
    inside = mean_merge(work.flatten(0, 1), label.flatten(), source.numel())
    joined, leader = components(inside.unsqueeze(0))
    means = mean_merge(inside, joined[0], leader.numel())
    return Regions(label, joined[0], means, source[leader])


def nearest(features: Tensor, means: Tensor) -> Tensor:
    """Region mean of largest cosine for every token, first one on ties (step 3).

    Parameters
    ----------
    features : Tensor
        ``[n, D]``.
    means : Tensor
        ``[M, D]``.

    Returns
    -------
    Tensor
        ``[n]`` int64.
    """
    targets = unit_vectors(means).T
    blocks = features.split(max(1, _MAX_PAIRS // means.shape[0]))
    return torch.cat([(unit_vectors(block) @ targets).argmax(dim=1) for block in blocks])


def merge_regions(features: Tensor, regions: Regions) -> tuple[MergedTokens, Tensor]:
    """Average every token into the region nearest to it (step 3).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    regions : Regions
        From ``find_regions`` on the same features.

    Returns
    -------
    merged : MergedTokens
        ``[n2, D]`` outputs ``(mean + sum of assigned) / (number assigned + 1)``, each standing at the patch
        that represents its region.
    assigned : Tensor
        ``[F * N]`` int64 output that each token went to.
    """
    flat = features.flatten(0, 1)
    label, joined, means, source = regions
    total, outputs = flat.shape[0], source.numel()
    assigned = nearest(flat, means)
    counts = torch.bincount(assigned, minlength=outputs)
    sums = mean_merge(as_float32(flat), assigned, outputs) * counts.unsqueeze(1)
    values = (means + sums) / (counts + 1).unsqueeze(1)
    region = label.flatten()
    target = joined[region]
    share = 1.0 / (torch.bincount(region)[region] * torch.bincount(joined)[target] * (counts[target] + 1))
    token = torch.arange(total, device=flat.device)
    merge_map = MergeMap(
        torch.cat((token, token)),
        torch.cat((target, assigned)),
        torch.cat((share, 1.0 / (counts[assigned] + 1))).float(),
    )
    return MergedTokens(values.to(features.dtype), source, merge_map), assigned


def _tune(
    count: Callable[[float], int], target: int, tau: float, step: float, tries: int, slack: tuple[float, float]
) -> dict[float, int]:
    """Thresholds tried and their counts: steps that double until the target is bracketed, then bisection."""
    low, high, tried = -1.0, 1.0, dict[float, int]()
    while len(tried) < tries:
        tried[tau] = count(tau)
        if target - slack[0] <= tried[tau] <= target + slack[1]:
            break
        if tried[tau] < target:
            low = tau
        else:
            high = tau
        beyond = tau + step if tried[tau] < target else tau - step
        step *= 2
        tau = beyond if low < beyond < high else (low + high) / 2
    return tried


def threshold_for(features: Tensor, retention: float, *, tolerance: float = TOLERANCE, cap: bool = False) -> float:
    """Threshold at which about ``retention * F * N`` tokens remain (ours).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    retention : float
        In (0, 1].
    tolerance : float
        Relative deviation of the count with which the search ends. Counts jump where components explode, so
        the deviation that remains can be larger.
    cap : bool
        Never end above the target.

    Returns
    -------
    float
        The threshold whose count is nearest to the target among those tried; -1.01, which leaves one token,
        if ``cap`` allows no other.

    Notes
    -----
    Wide features are first searched with 256 random projections (seeded), which needs a fraction of the
    products, and only the last few steps look at the features themselves.
    """
    frames, tokens, dim = features.shape
    target = keep_count(frames * tokens, retention)
    slack = tolerance * target

    def count_of(vectors: Tensor) -> Callable[[float], int]:
        return lambda tau: find_regions(vectors, tau).source.numel()

    tau, step, tries = _START, 0.05, _TRIES
    if dim > _SKETCH:
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(dim, _SKETCH, generator=generator).to(features.device)
        sketched = _tune(count_of(as_float32(features) @ projection), target, tau, step, tries, (slack, slack))
        tau = min(sketched, key=lambda t: abs(sketched[t] - target))
        step, tries = 0.005, _EXACT_TRIES
    exact = _tune(count_of(features), target, tau, step, tries, (slack, 0.0 if cap else slack))
    if cap:
        exact = {t: n for t, n in exact.items() if n <= target} or {-1.01: 1}
    return min(exact, key=lambda t: (abs(exact[t] - target), exact[t]))


@register
@dataclass
class LLaVAScissor(Method):
    """LLaVA-Scissor; without ``tau`` the threshold is searched for that meets the retention.

    Parameters
    ----------
    tau
        Threshold, as in the paper (0.9 in the released checkpoint); the retention then only matters at 1.
    approximate, epsilon, seed
        Sampled components of the released code, see `find_regions`; exact ones by default.
    cap
        Never keep more than the retention allows.
    """

    tau: float | None = None
    approximate: bool = False
    epsilon: float = EPSILON
    seed: int = 0
    cap: bool = False

    name: ClassVar[str] = "llava-scissor"
    title: ClassVar[str] = "LLaVA-Scissor"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.21862"
    venue: ClassVar[str] = "arXiv 2025"
    code: ClassVar[str] = "https://github.com/HumanMLLM/LLaVA-Scissor"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)
    kind: ClassVar[Kind] = "merge"
    exact_count: ClassVar[bool] = False
    uniform_views: ClassVar[bool] = True
    fidelity_note: ClassVar[str] = (
        "components are exact where the released code samples nodes of large graphs; a newline embedding that "
        "follows the whole video stays"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise MethodError(f"epsilon is {self.epsilon}, but it must be above 0; the published value is 0.05.")

    def token_count(self, layout: Layout) -> int | None:
        """Depends on the content."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Steps 1 to 3 on one video (or one picture as a video of one frame)."""
        features = sample.by_frame
        tau = threshold_for(features, self.retention, cap=self.cap) if self.tau is None else self.tau
        generator = torch.Generator().manual_seed(self.seed + sample.index)
        regions = find_regions(features, tau, approximate=self.approximate, epsilon=self.epsilon, generator=generator)
        merged, _ = merge_regions(features, regions)
        info = {"tau": tau, "frame_regions": regions.joined.numel()}
        # The released code forces a flat layout: no newline between frames or rows of a video.
        views = torch.zeros(0, dtype=torch.int64) if sample.layout.kind == "video" else None
        return Plan(merged.source, merged.features, merged.merge_map, self.position_policy, views=views, info=info)
