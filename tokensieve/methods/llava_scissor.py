"""LLaVA-Scissor: one token for every semantic region of a video.

Based on "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video LLMs" (arXiv
2506.21862). Tokens whose cosine exceeds a threshold are linked; the connected components of every frame are
averaged, the averages of all frames are linked and averaged again, and finally every original token is
averaged into the nearest result. The threshold decides how many tokens remain; here it is searched for so that
a retention is met, or given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokensieve.core.layout import Layout
from tokensieve.core.method import Kind, Method, Stage
from tokensieve.core.plan import Plan, SeparatorRule
from tokensieve.core.registry import register
from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError
from tokensieve.ops.allocate import keep_count
from tokensieve.ops.graph import cosine_matrix, matrix_components, similarity_components, tiled_components
from tokensieve.ops.merge import MergedTokens, MergeMap, gathered_sum, grouped_sum, mean_merge
from tokensieve.ops.similarity import UNIT_EPSILON, as_float32, stores_pairs, unit_vectors

TAU = 0.9
"""Threshold of the released checkpoint."""
EPSILON = 0.05
TOLERANCE = 0.02
_STEP = 0.05
_TRIES = 16
_UNLINKED = -2.0
_MAX_PAIRS = 4 * 1024 * 1024


class Regions(NamedTuple):
    """Connected components of a video (steps 1 and 2).

    Attributes
    ----------
    label : Tensor
        ``[F, N]`` int64 region of every token inside its frame, counted through the frames.
    joined : Tensor
        ``[n1]`` int64 region of the video that every region of a frame belongs to.
    source : Tensor
        ``[n2]`` int64 token ``frame * N + patch`` that stands for each region of the video, ascending.
    """

    label: Tensor
    joined: Tensor
    source: Tensor


class _Cosines(NamedTuple):
    """Cosines of all pairs of tokens ``[n, n]`` and their lengths ``[n]``: enough for any threshold."""

    cosine: Tensor
    norms: Tensor


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

    def components(vectors: Tensor) -> tuple[Tensor, Tensor]:
        sampled = None
        if approximate:
            sampled = _sample(vectors.shape[0], vectors.shape[1], epsilon, generator).to(vectors.device)
        return similarity_components(unit_vectors(vectors), tau, sampled=sampled)

    label, source = components(features)
    joined, leader = components(_averaged(as_float32(features).flatten(0, 1), label.flatten(), source.numel())[None])
    return Regions(label, joined[0], source[leader])


def _averaged(vectors: Tensor, label: Tensor, count: int) -> Tensor:
    """Mean of the vectors of each component; they themselves when each is its own component."""
    return vectors if count == vectors.shape[0] else mean_merge(vectors, label, count)


def _regions_of_cosines(cosines: _Cosines, frames: int, tau: float) -> Regions:
    """`find_regions` (exact) from cosines: products of means are means of products."""
    cosine, norms = cosines
    total = norms.numel()
    each = torch.arange(frames, device=cosine.device)
    inside = cosine.view(frames, total // frames, frames, -1)[each, :, each]
    label, source = matrix_components(inside, tau)
    large = (torch.bincount(label.flatten()) > 1).nonzero()[:, 0]
    products = _products_of_means(cosines, label.flatten(), source, large)

    stands = torch.zeros(total, dtype=torch.bool, device=cosine.device)
    stands[source] = True
    tokens = source[large]

    def tile(graph: slice, start: int, end: int) -> Tensor:
        # A region of one token has the cosines of that token; tokens that stand for no region are linked to nothing.
        found = cosine[start:end, start:].masked_fill(~stands[start:], _UNLINKED)
        later = tokens >= start
        here = later & (tokens < end)
        found[:, tokens[later] - start] = products[start:end, later]
        found[tokens[here] - start] = products[start:, here].T
        return found.masked_fill_(~stands[start:end].unsqueeze(1), _UNLINKED).unsqueeze(0)

    component, leader = tiled_components(tile, 1, total, tau, cosine.device)
    named = stands[leader]
    return Regions(label, (named.cumsum(0) - 1)[component[0, source]], leader[named])


def _products_of_means(cosines: _Cosines, label: Tensor, source: Tensor, large: Tensor) -> Tensor:
    """Cosines ``[n, L]`` of region means, at the tokens that stand for the regions, with the regions of several tokens.

    Elsewhere they are not linked.
    """
    cosine, norms = cosines
    place = torch.full_like(source, -1)
    place[large] = torch.arange(large.numel(), device=large.device)
    members = (place[label] >= 0).nonzero()[:, 0]
    # A sum has the direction of its mean.
    half = gathered_sum(cosine, members, place[label[members]], large.numel(), norms[members])
    products = grouped_sum(half.T, label, source.numel(), norms)
    lengths = norms[source]
    lengths[large] = products[large, torch.arange(large.numel(), device=large.device)].clamp_min(0).sqrt()
    lengths.clamp_min_(UNIT_EPSILON)
    products = products.div_(lengths[large]).div_(lengths.unsqueeze(1)).clamp_max_(1.0)
    spread = products.new_full((norms.numel(), large.numel()), _UNLINKED)
    spread[source] = products
    return spread


def _means(features: Tensor, regions: Regions) -> Tensor:
    """Mean of the means of the regions ``[n2, D]``, however large each region is (step 2)."""
    label, joined, source = regions
    inside = _averaged(as_float32(features).flatten(0, 1), label.flatten(), joined.numel())
    return _averaged(inside, joined, source.numel())


def _shares(regions: Regions) -> tuple[Tensor, Tensor]:
    """Region of the video that every token belongs to ``[F * N]``, and its weight in the region's mean."""
    region = regions.label.flatten()
    target = regions.joined[region]
    return target, 1.0 / (torch.bincount(region)[region] * torch.bincount(regions.joined)[target])


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


def _nearest_of_cosines(cosines: _Cosines, regions: Regions, means: Tensor) -> Tensor:
    """`nearest` from cosines."""
    target, share = _shares(regions)
    products = grouped_sum(cosines.cosine, target, means.shape[0], cosines.norms * share)
    return products.div_(means.norm(dim=1).clamp_min(UNIT_EPSILON).unsqueeze(1)).argmax(dim=0)


def merge_regions(
    features: Tensor, regions: Regions, *, cosines: _Cosines | None = None
) -> tuple[MergedTokens, Tensor]:
    """Average every token into the region nearest to it (step 3).

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    regions : Regions
        From ``find_regions`` on the same features.
    cosines : optional
        Result of a search, saves the products of tokens and regions.

    Returns
    -------
    merged : MergedTokens
        ``[n2, D]`` outputs ``(mean + sum of assigned) / (number assigned + 1)``, each standing at the patch
        that represents its region.
    assigned : Tensor
        ``[F * N]`` int64 output that each token went to.
    """
    flat, outputs = features.flatten(0, 1), regions.source.numel()
    means = _means(features, regions)
    assigned = nearest(flat, means) if cosines is None else _nearest_of_cosines(cosines, regions, means)
    counts = torch.bincount(assigned, minlength=outputs)
    sums = grouped_sum(as_float32(flat), assigned, outputs)
    values = (means + sums) / (counts + 1).unsqueeze(1)
    target, share = _shares(regions)
    token = torch.arange(flat.shape[0], device=flat.device)
    merge_map = MergeMap(
        torch.cat((token, token)),
        torch.cat((target, assigned)),
        torch.cat((share / (counts[target] + 1), 1.0 / (counts[assigned] + 1))).float(),
    )
    return MergedTokens(values.to(features.dtype), regions.source, merge_map), assigned


def search_regions(
    features: Tensor, retention: float, *, tolerance: float = TOLERANCE, cap: bool = False
) -> tuple[float, MergedTokens]:
    """Choose the threshold so that about ``retention * F * N`` tokens remain (ours).

    The search starts at the published threshold, takes steps that double until the target is bracketed, and
    then bisects.

    Parameters
    ----------
    features : Tensor
        ``[F, N, D]``.
    retention : float
        In (0, 1].
    tolerance : float
        Relative deviation of the count with which the search ends. Counts jump where components explode, so
        the deviation that remains after 16 thresholds can be larger.
    cap : bool
        Never end above the target.

    Returns
    -------
    tau : float
        The threshold whose count is nearest to the target among those tried. Below -1, which leaves one
        token, if ``cap`` allows no other.
    merged : MergedTokens
        The result with that threshold.
    """
    frames, total = features.shape[0], features.shape[0] * features.shape[1]
    target = keep_count(total, retention)
    cosines: _Cosines | None = None
    if stores_pairs(total, features.shape[2]):
        flat = as_float32(features).flatten(0, 1)
        cosines = _Cosines(cosine_matrix(unit_vectors(flat)), flat.norm(dim=1))

    def regions_at(tau: float) -> Regions:
        return find_regions(features, tau) if cosines is None else _regions_of_cosines(cosines, frames, tau)

    low, high, tau, step = -1.0, 1.0, TAU, _STEP
    best: tuple[float, Regions] | None = None
    for _ in range(_TRIES):
        regions = regions_at(tau)
        count = regions.source.numel()
        if not (cap and count > target) and (
            best is None or abs(count - target) < abs(best[1].source.numel() - target)
        ):
            best = tau, regions
        if abs(count - target) <= tolerance * target and not (cap and count > target):
            break
        too_few = count < target
        low, high = (tau, high) if too_few else (low, tau)
        beyond = tau + step if too_few else tau - step
        tau = beyond if low < beyond < high else (low + high) / 2
        step *= 2
    best = best or (-1.01, regions_at(-1.01))
    return best[0], merge_regions(features, best[1], cosines=cosines)[0]


@register
@dataclass
class LLaVAScissor(Method):
    """LLaVA-Scissor; without ``tau`` the threshold is searched for that meets the retention.

    Parameters
    ----------
    tau
        Threshold, as in the paper (0.9 in the released checkpoint); the retention then only matters at 1.
    approximate, epsilon, seed
        Sampled components of the released code, see `find_regions`; exact ones by default. Needs ``tau``.
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
    fidelity_note: ClassVar[str] = "components are exact where the released code samples nodes of large graphs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise MethodError(f"epsilon is {self.epsilon}, but it must be above 0; the published value is 0.05.")
        if self.approximate and self.tau is None:
            raise MethodError(
                "approximate components would make the search for a threshold random; give tau as well, for "
                f"example tau={TAU}."
            )

    def token_count(self, layout: Layout) -> int | None:
        """Depends on the content."""
        return None

    def plan_tokens(self, sample: TokenSample) -> Plan:
        """Steps 1 to 3 on one video (or one picture as a video of one frame)."""
        features = sample.by_frame
        if self.tau is None:
            tau, merged = search_regions(features, self.retention, cap=self.cap)
        else:
            tau, generator = self.tau, torch.Generator().manual_seed(self.seed + sample.index)
            regions = find_regions(
                features, tau, approximate=self.approximate, epsilon=self.epsilon, generator=generator
            )
            merged, _ = merge_regions(features, regions)
        # The released code forces a flat layout: no newline between frames or rows of a video, nor behind it.
        rule: SeparatorRule = "drop" if sample.layout.kind == "video" else "in-place"
        return Plan(
            merged.source,
            merged.features,
            merged.merge_map,
            self.position_policy,
            rule,
            info={"tau": tau},
        )
